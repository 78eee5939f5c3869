"""Names of a sample set: the folder of this program, and the .npz of the published script."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from generation.config import GenerateConfig, network_name
from models.autoencoder import PUBLISHED_NAMES, LatentFormat
from models.checkpoint import resolve_checkpoint, saved_settings, steps_done
from models.hub import FILE_ENDINGS
from models.sit import SiTConfig

NETWORK_NAME = re.compile(r"[\w.-]+/\d+")  # SiT-XL/2


def default_name(config: GenerateConfig, checkpoint: dict[str, Any]) -> str:
    """Return a folder name that contains the settings in which sample sets usually differ."""
    # The run's name comes from a file that may be untrusted: its folders are removed, to stay inside --sample-dir.
    run = saved_settings(checkpoint, config.ckpt).get("exp_name")
    run = Path(run if isinstance(run, str) and run.isprintable() else "").name or Path(config.ckpt).stem
    steps = "" if config.solver == "dopri5" else f"-{config.num_steps}"
    solver = config.mode if config.mode == "sde" else f"ode-{config.chosen_solver}"
    scales, interval = config.guidance, f"{config.guidance_low:g}-{config.guidance_high:g}"
    guidance = f"cfg-{scales.scale:g}-cls-{scales.cls_scale:g}-at-{interval}" if scales.scale > 1 else "no-cfg"
    guidance += "-path-drop" if scales.scale > 1 and scales.path_drop else ""
    weights = f"{run}-{steps_done(checkpoint, config.ckpt):07d}-{config.weights}"
    shift = "" if config.time_shift is None else f"-shift-{config.time_shift}"
    labels = f"{'no' if config.label_sampling == 'none' else config.label_sampling}-labels"
    return f"{weights}-{solver}{steps}{shift}-{guidance}-{labels}-seed-{config.global_seed}"


def published_name(
    config: GenerateConfig,
    checkpoint: dict[str, Any],
    network: SiTConfig,
    codec: LatentFormat,
    resolved: Path | None = None,
) -> str:
    """Return the name of the .npz, without its ending, that REG's script gives to a set with these settings.

    For example SiT-XL-2-0400000-size-256-vae-ema-cfg-2.3-seed-0-sde-0.85-2.3: network, checkpoint, resolution, codec,
    guidance scale, seed, mode, upper end of the guidance interval, guidance scale of the class token. `resolved` is the
    checkpoint that a run's folder stood for; default: its newest.
    """
    model = network_name(network, saved_settings(checkpoint, config.ckpt))
    model = model.replace("/", "-") if isinstance(model, str) and NETWORK_NAME.fullmatch(model) else "SiT"
    path = Path(config.ckpt)  # may also be a name on the hub
    path = (resolved or resolve_checkpoint(path)).absolute() if path.is_dir() else path
    step = path.stem if path.name.endswith(FILE_ENDINGS) else path.name
    decoder = Path(codec.codec).name
    vae = {name: short for short, name in PUBLISHED_NAMES.items()}.get(decoder, decoder)
    size, scales = network.input_size * codec.factor, config.guidance
    content = f"size-{size}-vae-{vae}-cfg-{scales.scale}-seed-{config.global_seed}"
    return f"{model}-{step}-{content}-{config.mode}-{config.guidance_high}-{scales.cls_scale}"
