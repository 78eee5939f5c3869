"""A diffusers pipeline that samples as in the paper (REG, arXiv 2507.01467) from an exported network.

    from models.pipeline import REGPipeline
    pipeline = REGPipeline.from_pretrained("reg-xl").to("cuda")
    images = pipeline([207, 360], guidance_scale=2.3, guidance_interval=(0, 0.85)).images

A network trained without labels generates images from their number: pipeline(num_images=2).

For the same seed, image N equals image N of generate.py. A folder or hub repository provides only data: no downloaded
code is run. This module is in models/ because it wraps a network and its codec; it imports the samplers nevertheless.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.classes import ClassSet
from common.errors import InputError
from common.io import OwnFile, check_writable, read_json
from models.autoencoder import Codec, KLCodec, load_decoder, network_format
from models.checkpoint import build_model, checkpoint_classes, load_checkpoint, saved_settings, steps_done
from models.checksums import FOLDER_CHECKSUMS
from models.conditioning import is_unconditional
from models.interpolant import Interpolant
from models.safetensors_format import (
    CLASS_NAME,
    CODEC_FOLDER,
    CONFIG_FILE,
    KEPT_SETTINGS,
    WEIGHTS_FILE,
    class_name,
    export_config,
    write_network,
)
from models.sit import SiT
from models.tensor_checks import check_finite
from samplers import Guidance, image_seeds, sample_images

BATCH_SIZE = 32  # the images do not depend on it
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class REGPipeline(DiffusionPipeline):
    """Generates images from class labels, or without labels.

    Args:
        transformer: the trained network.
        vae: the codec that decodes its latents.
        path_type: the path the network was trained on.
        time_shift: the time shift of the sampler's steps, that of its training, see `Interpolant.shift`; 1: none.
        classes: the classes of its training data, a `ClassSet` or its JSON; default: all labels of the network.
        unconditional: whether it was trained without labels.
    """

    def __init__(
        self,
        transformer: SiT,
        vae: Codec,
        path_type: str = "linear",
        classes: ClassSet | dict[str, Any] | None = None,
        time_shift: float = 1.0,
        unconditional: bool = False,
    ):
        super().__init__()
        Interpolant(path_type, time_shift)  # raises ValueError for values that are not allowed
        if isinstance(classes, ClassSet):
            classes = classes.to_json()
        self.register_modules(transformer=transformer, vae=vae)
        training = {"path_type": path_type, "time_shift": time_shift, "unconditional": unconditional}
        self.register_to_config(classes=classes, **training)
        self.classes = checkpoint_classes({"classes": classes}, transformer.num_classes, "REGPipeline")
        self._run: dict[str, Any] = {}  # of the run's settings, those that an export contains

    @classmethod
    def from_pretrained(
        cls, path: str | Path, vae: str | Codec | None = None, torch_dtype: torch.dtype | None = None
    ) -> REGPipeline:
        """Return the pipeline of an exported network or checkpoint. Raises InputError if a file is missing or damaged.

        Args:
            path: as for `models.checkpoint.load_checkpoint`, such as a local folder or a hub repository "owner/name".
            vae: the codec, its name or its folder; default: see `load_decoder`.
            torch_dtype: dtype of network and codec; default: float32.
        """
        checkpoint = load_checkpoint(path)
        settings = saved_settings(checkpoint, path)
        transformer = build_model(checkpoint, source=path)
        codec = vae
        if not isinstance(vae, Codec):
            latents = network_format(settings.get("codec"), transformer.config.in_channels, vae, path)
            codec = load_decoder(latents, vae)
        trained_on, classes = Interpolant.of_run(settings), checkpoint.get("classes")
        unconditional = is_unconditional(settings)
        pipeline = cls(transformer, codec, trained_on.path_type, classes, trained_on.time_shift, unconditional)
        settings = {"weights": "ema", **settings, "steps": steps_done(checkpoint, path)}
        pipeline._run = {name: settings.get(name) for name in KEPT_SETTINGS}
        return pipeline if torch_dtype is None else pipeline.to(torch_dtype)

    def save_pretrained(self, save_directory: str | Path, *_: Any, push_to_hub: bool = False, **options: Any) -> None:
        """Write network, codec and configuration to a folder, from which `from_pretrained` makes an equal pipeline.

        The folder is an exported network: all programs accept it. diffusers' arguments about the format of the files
        have no effect. With `push_to_hub`, the folder is also uploaded; `repo_id` and the further `options` are those
        of diffusers' method `push_to_hub`.
        """
        folder = Path(save_directory)
        self._check_folder(folder)
        latent_format = self.vae.format.to_json()
        if isinstance(self.vae, KLCodec):
            self.vae.autoencoder.save_pretrained(folder / CODEC_FOLDER, safe_serialization=True)
            latent_format["codec"] = CODEC_FOLDER
        sampled_with = {"path_type": self.config.path_type, "time_shift": self.config.time_shift}
        sampled_with["cfg_prob"] = 1.0 if self.config.unconditional else None
        run = {**self._run, **sampled_with, "codec": latent_format}
        classes = self.classes.to_json() if self.config.classes else None
        config = export_config(self.transformer.config, run, classes)
        write_network(folder, self.transformer.state_dict(), config)
        if push_to_hub:
            repo_id = options.pop("repo_id", folder.name)
            used = ("commit_message", "private", "token", "create_pr")
            self.push_to_hub(repo_id, **{name: options[name] for name in used if name in options})

    @staticmethod
    def _check_folder(folder: Path) -> None:
        """Raise InputError if a folder has files of an export's names that are not of an export."""
        own = OwnFile("of an exported network", lambda path: class_name(read_json(path)) == CLASS_NAME)
        check_writable(folder / CONFIG_FILE, "save_directory", own=own)
        names = (WEIGHTS_FILE, FOLDER_CHECKSUMS, CODEC_FOLDER)
        if not (folder / CONFIG_FILE).exists() and (found := [name for name in names if (folder / name).exists()]):
            problem = f"has {', '.join(found)}, but no {CONFIG_FILE}"
            raise InputError(f"save_directory {folder}: {problem} of an export; choose another folder")

    def to(self, *args: Any, **kwargs: Any) -> REGPipeline:
        """Move or convert the pipeline, as diffusers does. The time embedders stay float32, see `inference.convert`."""
        super().to(*args, **kwargs)
        for embedder in filter(None, (self.transformer.t_embedder, self.transformer.t_cls_embedder)):
            embedder.float()
        check_finite(dict(self.transformer.named_parameters()), "weights of the pipeline")  # float16 ends at 65504
        return self

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        num_inference_steps: int = 250,
        guidance_scale: float = 1.0,
        cls_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        mode: str = "sde",
        solver: str = "euler",
        seed: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        path_drop_guidance: bool = False,
        num_images: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Return one image for each label, or `num_images` images of a network trained without labels.

        Args:
            class_labels: one label or several, 0 .. num_classes - 1; class names, if the training data had them. None
                for a network trained without labels, which has no guidance either.
            num_inference_steps: number of solver steps (paper: 250).
            guidance_scale: guidance scale of the image; 1: no guidance.
            cls_guidance_scale: guidance scale of the class token; default: `guidance_scale`.
            guidance_interval: lowest and highest time with guidance; time 0 is data (paper: 0 to 0.85). With a time
                shift, these are shifted times; with a lead of the class token, times of the image.
            mode, solver: see `samplers.sample`.
            seed: an image depends on the seed, its number and its label, as in generate.py; default: 0.
            generator: source of the noise instead of `seed`: one for all images, or a list with one for each image.
            output_type: "pil" for a list of images; "np" for an array (N, H, W, 3), float32 from 0 to 1; "pt" for a
                tensor (N, 3, H, W), float32 from 0 to 1; "latent" for what `vae.decode` takes, (N, C, h, w) float32.
            return_dict: return an `ImagePipelineOutput` with the field `images`, else a tuple with that element.
            path_drop_guidance: whether the unconditional velocity skips the middle blocks; needs a network with SPRINT.
            num_images: number of images of a network trained without labels; default: 1.

        Raises ValueError, naming the argument, for a value that is not allowed.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r} is unknown; allowed: {', '.join(OUTPUT_TYPES)}")
        if not isinstance(num_inference_steps, Integral) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; allowed: whole numbers from 1")
        if not isinstance(guidance_interval, tuple | list) or len(guidance_interval) != 2:
            raise ValueError(f"guidance_interval {guidance_interval}: must be a pair, lowest and highest time")
        if path_drop_guidance and not self.transformer.config.sprint:
            raise ValueError("path_drop_guidance: needs a network with SPRINT, and this network has none")
        guidance = Guidance(guidance_scale, cls_guidance_scale, *guidance_interval, path_drop_guidance)
        reason = f"only guidance_scale above 1 turns guidance on, and it is {guidance_scale:g}"
        if guidance.ignores_cls_scale:
            warnings.warn(f"cls_guidance_scale {cls_guidance_scale:g} has no effect: {reason}", stacklevel=3)
        if guidance.ignores_path_drop:
            warnings.warn(f"path_drop_guidance has no effect: {reason}", stacklevel=3)
        path = Interpolant(self.config.path_type, self.config.time_shift)
        sampler = (path, guidance, mode, solver, num_inference_steps)
        labels = self._image_labels(class_labels, num_images, guidance_scale)
        seeds = _noise_seeds(seed, generator, len(labels))

        parts = [slice(first, first + BATCH_SIZE) for first in range(0, len(labels), BATCH_SIZE)]
        found = []
        with self.progress_bar(total=num_inference_steps * len(parts)) as bar:
            for part in parts:
                progress = partial(_counted, bar)
                latents, _ = sample_images(self.transformer, labels[part], seeds[part], *sampler, progress=progress)
                found.append(latents.float() if output_type == "latent" else self.vae.decode(latents.float()))
        images = _as_output_type(torch.cat(found), output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _image_labels(self, class_labels: Any, num_images: Any, guidance_scale: float) -> list[int]:
        """Return the label of each image: those of `class_labels`, or the null class without labels."""
        if not self.config.unconditional:
            if num_images is not None:
                raise ValueError(f"num_images is {num_images!r}, but class_labels decides it for this network")
            return self._labels(class_labels)
        why = "this network was trained without labels"
        if class_labels is not None:
            raise ValueError(f"class_labels is {class_labels!r:.80}, but {why}; expected num_images instead")
        if guidance_scale > 1:
            raise ValueError(f"guidance_scale is {guidance_scale:g}, but {why}, so it has no guidance; allowed: 1")
        num_images = 1 if num_images is None else num_images
        if not isinstance(num_images, Integral) or isinstance(num_images, bool) or num_images < 1:
            raise ValueError(f"num_images is {num_images!r:.80}; allowed: whole numbers from 1")
        return [self.transformer.null_class] * int(num_images)

    def _labels(self, class_labels: Any) -> list[int]:
        """Return the labels that the argument `class_labels` names. Warns of labels without training data."""
        if isinstance(class_labels, Tensor | np.ndarray):
            class_labels = class_labels.tolist()
        several = class_labels if isinstance(class_labels, Iterable) and not isinstance(class_labels, str) else None
        labels, count = [], self.transformer.num_classes
        for given in [class_labels] if several is None else several:
            label = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
            if isinstance(label, str):
                labels += self.classes.select(label, count)
            elif isinstance(label, Integral) and not isinstance(label, bool) and 0 <= label < count:
                labels.append(int(label))
            else:
                raise ValueError(
                    f"class_labels has {label!r}; allowed: whole numbers 0 .. {count - 1}, and class names"
                )
        if not labels:
            raise ValueError("class_labels is empty; expected at least one label")
        if untrained := self.classes.untrained(labels):
            warnings.warn(f"class_labels: {untrained}", stacklevel=5)
        return labels


def _noise_seeds(seed: int | None, generator: torch.Generator | list | None, count: int) -> list[int]:
    """Return the seed of each image's noise, by the arguments `seed` and `generator` of the pipeline."""
    if generator is None:
        seed = 0 if seed is None else seed
        if not isinstance(seed, Integral) or seed < 0:
            raise ValueError(f"seed is {seed!r}; allowed: whole numbers from 0")
        return image_seeds(int(seed), range(count))
    if seed is not None:
        raise ValueError("seed and generator are both given; allowed: one of them")
    if isinstance(generator, torch.Generator):
        return image_seeds(_drawn(generator), range(count))
    if not isinstance(generator, list | tuple) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(f"generator is {generator!r:.80}; expected a torch.Generator or a list of them")
    if len(generator) != count:
        raise ValueError(
            f"generator is a list of {len(generator)}, but there are {count} images; expected one for each"
        )
    return [image_seeds(_drawn(one), [0])[0] for one in generator]


def _drawn(generator: torch.Generator) -> int:
    """Return a random whole number, which changes the generator's state, so that the next call draws other noise."""
    return int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))


def _counted(bar: tqdm, steps: list[Any]) -> Iterator[Any]:
    """Yield the steps and count them in the bar."""
    for step in steps:
        yield step
        bar.update()


def _as_output_type(found: Tensor, output_type: str) -> Tensor | np.ndarray | list[Image.Image]:
    """Return latents unchanged, and decoded images (N, 3, H, W) uint8 as diffusers' output types have them."""
    if output_type == "latent":
        return found
    if output_type == "pt":
        return found.float() / 255
    pixels = found.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels] if output_type == "pil" else pixels.astype(np.float32) / 255
