"""A diffusers pipeline that generates with the paper's sampler (REG, arXiv 2507.01467) from an exported network.

    from models.pipeline import REGPipeline
    images = REGPipeline.from_pretrained("reg-xl").to("cuda")([207, 360], guidance_scale=2.3).images

Its images are those of generate.py, number by number. A folder or a repository of the hub only gives data: the code is
this file's and nothing fetched is run.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from models.autoencoder import Codec, LatentFormat, load_codec
from models.checkpoint import build_model, load_checkpoint, saved_settings
from models.hub import hub_file
from models.interpolant import Interpolant
from models.safetensors_format import CONFIG_FILE, WEIGHTS_FILE
from models.sit import SiT
from samplers import Guidance, image_seeds, sample_images

BATCH_SIZE = 32  # images at a time; the images do not depend on it


class REGPipeline(DiffusionPipeline):
    """Class labels to images.

    Args:
        transformer: the trained network.
        vae: the codec that decodes its latents.
        path_type: the path it was trained on.
    """

    def __init__(self, transformer: SiT, vae: Codec, path_type: str = "linear"):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(path_type=path_type)

    @classmethod
    def from_pretrained(cls, path: str | Path, vae: str | Codec | None = None) -> REGPipeline:
        """Return the pipeline of an exported network or of a checkpoint.

        Args:
            path: a local folder, .safetensors file or checkpoint, or a repository of the hub, "owner/name".
            vae: the codec, or its name or folder; default: the one that made the latents (Stable Diffusion's "ema").

        Raises:
            InputError: the network or the codec is not there, or is damaged.
        """
        if not Path(path).exists():
            instead = f"Put its {CONFIG_FILE} and {WEIGHTS_FILE} into a folder and give that instead."
            files = [hub_file(str(path), name, instead) for name in (CONFIG_FILE, WEIGHTS_FILE)]
            path = files[0].parent
        checkpoint = load_checkpoint(path)
        settings = saved_settings(checkpoint, path)
        codec = vae
        if not isinstance(codec, Codec):
            name = vae or LatentFormat.from_json(settings.get("codec")).codec
            codec = load_codec("sd-vae-ft-ema" if vae is None and name == "sd-vae-ft-mse" else name)
        return cls(build_model(checkpoint, source=path), codec, settings.get("path_type", "linear"))

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: int | list[int],
        num_inference_steps: int = 250,
        guidance_scale: float = 1.0,
        cls_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        mode: str = "sde",
        solver: str = "euler",
        seed: int = 0,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Return one image for each label.

        Args:
            class_labels: 0 .. num_classes - 1.
            num_inference_steps: of the solver (paper: 250).
            guidance_scale, cls_guidance_scale: of image and class token; the second as the first where not given.
            guidance_interval: times with guidance; 0 is data (paper: 0 to 0.85).
            mode, solver: see `samplers.sample`.
            seed: an image comes from the seed and its number, as in generate.py.
            output_type: "pil" or "np", (N, H, W, 3) uint8.
        """
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        guidance = Guidance(
            guidance_scale, guidance_scale if cls_guidance_scale is None else cls_guidance_scale, *guidance_interval
        )
        images = []
        for first in self.progress_bar(range(0, len(labels), BATCH_SIZE)):
            part = labels[first : first + BATCH_SIZE]
            latents, _ = sample_images(
                self.transformer,
                part,
                image_seeds(seed, range(first, first + len(part))),
                Interpolant(self.config.path_type),
                guidance,
                mode,
                solver,
                num_inference_steps,
            )
            images.append(self.vae.decode(latents.float()).permute(0, 2, 3, 1).cpu())
        pixels = torch.cat(images).numpy()
        return ImagePipelineOutput([Image.fromarray(image) for image in pixels] if output_type == "pil" else pixels)
