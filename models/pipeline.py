"""A diffusers pipeline that samples as in the paper (REG, arXiv 2507.01467) from an exported network.

    from models.pipeline import REGPipeline
    images = REGPipeline.from_pretrained("reg-xl").to("cuda")([207, 360], guidance_scale=2.3).images

For the same seed, image N equals image N of generate.py. A folder or hub repository provides only data: no downloaded
code is run. This module is in models/ because it wraps a network and its codec; it imports the samplers nevertheless.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from models.autoencoder import Codec, LatentFormat, load_decoder
from models.checkpoint import build_model, load_checkpoint, saved_settings
from models.hub import hub_file
from models.interpolant import Interpolant
from models.safetensors_format import CONFIG_FILE, WEIGHTS_FILE
from models.sit import SiT
from samplers import Guidance, image_seeds, sample_images

BATCH_SIZE = 32  # the images do not depend on it


class REGPipeline(DiffusionPipeline):
    """Generates images from class labels.

    Args:
        transformer: the trained network.
        vae: the codec that decodes its latents.
        path_type: the path the network was trained on.
    """

    def __init__(self, transformer: SiT, vae: Codec, path_type: str = "linear"):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(path_type=path_type)

    @classmethod
    def from_pretrained(cls, path: str | Path, vae: str | Codec | None = None) -> REGPipeline:
        """Return the pipeline of an exported network or checkpoint. Raises InputError if a file is missing or damaged.

        Args:
            path: a local folder, .safetensors file or checkpoint, or a hub repository "owner/name".
            vae: the codec, its name or its folder; default: see `load_decoder`.
        """
        if not Path(path).exists():
            instead = f"Put its {CONFIG_FILE} and {WEIGHTS_FILE} into a folder and give that folder instead."
            files = [hub_file(str(path), name, instead) for name in (CONFIG_FILE, WEIGHTS_FILE)]
            path = files[0].parent
        checkpoint = load_checkpoint(path)
        settings = saved_settings(checkpoint, path)
        codec = vae if isinstance(vae, Codec) else load_decoder(LatentFormat.from_json(settings.get("codec")), vae)
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
            num_inference_steps: number of solver steps (paper: 250).
            guidance_scale: guidance scale of the image; 1: no guidance.
            cls_guidance_scale: guidance scale of the class token; default: `guidance_scale`.
            guidance_interval: lowest and highest time with guidance; time 0 is data (paper: 0 to 0.85).
            mode, solver: see `samplers.sample`.
            seed: an image depends on the seed, its number and its label, as in generate.py.
            output_type: "pil" for a list of images, "np" for an array (N, H, W, 3) uint8.
        """
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        guidance = Guidance(guidance_scale, cls_guidance_scale, *guidance_interval)
        sampler, images = (Interpolant(self.config.path_type), guidance, mode, solver, num_inference_steps), []
        for first in self.progress_bar(range(0, len(labels), BATCH_SIZE)):
            part = labels[first : first + BATCH_SIZE]
            seeds = image_seeds(seed, range(first, first + len(part)))
            latents, _ = sample_images(self.transformer, part, seeds, *sampler)
            images.append(self.vae.decode(latents.float()).permute(0, 2, 3, 1).cpu())
        pixels = torch.cat(images).numpy()
        return ImagePipelineOutput([Image.fromarray(image) for image in pixels] if output_type == "pil" else pixels)
