"""Export the network of a checkpoint: its weights and its configuration, without the state of the training run.

    python export.py --ckpt exps/NAME/checkpoints/0400000.pt --dest reg-xl.safetensors
    python export.py --ckpt exps/NAME/checkpoints/0400000.pt --dest reg-xl

    python export.py --layout sit --ckpt SiT-XL-2-256x256.pt --dest sit-xl    (weights of SiT's authors, converted)

A .safetensors file contains both. A folder has the layout of the Hugging Face hub, and `REGPipeline.from_pretrained`
generates images from it. All programs accept both in place of a checkpoint. A codec that is a local folder is copied
into the export, to FOLDER/vae; the files of a codec that has a name are downloaded when they are needed.

The SHA-256 of a file is in FILE.safetensors.sha256, those of a folder's files are in FOLDER/checksums.sha256. Both have
the format of `sha256sum --check` and are compared when an export is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from common.cli import Config, parse, setting
from common.errors import InputError, run_cli
from common.identity import Unchanged, files_of
from common.io import check_writable
from common.temporary import atomic_write
from models.autoencoder import SD_FORMAT, LatentFormat
from models.checkpoint import (
    build_model,
    checkpoint_classes,
    load_checkpoint,
    network_config,
    network_weights,
    newest_of_run,
    resolve_checkpoint,
    saved_settings,
    steps_done,
)
from models.checksums import checksum_path
from models.conditioning import is_unconditional
from models.exported_codec import export_codec
from models.hub import FILE_ENDINGS
from models.layouts import LAYOUTS
from models.safetensors_format import CONFIG_FILE, export_config, write_network

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [{tags}]
---
# {name}

A {model} denoising transformer of the REG family ([arXiv 2507.01467](https://arxiv.org/abs/2507.01467)), {classes}, \
{origin}; {weights} weights. Written by `export.py`; with the code of that repository:

```python
from models.pipeline import REGPipeline

images = REGPipeline.from_pretrained("{name}")({call}).images
```
"""
GUIDED = "guidance_scale=2.3, guidance_interval=(0, 0.85)"  # in the card's call


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Export."""

    ckpt: str = setting(MISSING, "checkpoint, ours or published; a run's folder: its newest; or a name on the hub")
    dest: str = setting(MISSING, "a .safetensors file, or a new folder in the layout of the Hugging Face hub")
    weights: str = setting("ema", "which weights of the checkpoint to export", choices=("ema", "model"))
    layout: str = setting(
        "auto",
        "whose weights these are; sit: those of SiT's authors, where t = 0 is noise, which are converted; reg: this "
        "project's; auto: refuse a file that does not show it",
        choices=LAYOUTS,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Export the network of a checkpoint as the command line says."""
    config = parse(ExportConfig, "Export the network of a checkpoint.", argv)
    path = export(config.ckpt, config.dest, config.weights, config.layout)
    print(*newest_of_run(config.ckpt, path), config.dest, sep="\n")


def export(ckpt: str | Path, dest: str | Path, weights: str = "ema", layout: str = "auto") -> Path:
    """Write the network of a checkpoint to a .safetensors file or a folder, and return the checkpoint's path.

    `layout`: see `load_checkpoint`.
    Raises InputError if the checkpoint has no such network, or if `dest` exists already or cannot be written.
    """
    dest = Path(dest)
    if dest.suffix != ".safetensors" and dest.name.endswith(FILE_ENDINGS):
        raise InputError(f"--dest {dest}: allowed: a name that ends in .safetensors, or the name of a folder")
    if (dest.exists() or dest.is_symlink()) and not (dest.is_dir() and not any(dest.iterdir())):
        raise InputError(f"--dest {dest}: there is something already; choose another name")
    if dest.suffix == ".safetensors" and checksum_path(dest).exists():
        raise InputError(f"--dest {dest}: {checksum_path(dest)} exists already; choose another name")
    check_writable(dest if dest.suffix == ".safetensors" else dest / CONFIG_FILE, "--dest")
    path = resolve_checkpoint(ckpt)  # once: training may add a newer one
    opened = Unchanged(files_of(path))
    checkpoint = load_checkpoint(path, layout=layout)
    build_model(checkpoint, weights, source=ckpt)  # a network that cannot be rebuilt is not exported
    config = describe(checkpoint, weights, ckpt)
    if "codec" in config:
        config["codec"] = export_codec(LatentFormat.from_json(config["codec"]), dest)
    write_network(dest, network_weights(checkpoint, weights, ckpt), config)
    opened.check()  # tensors are read from the file when they are written
    if dest.suffix != ".safetensors":
        with atomic_write(dest / "README.md", "w") as file:
            tags = "image-generation" if config["cls_token_dim"] is None else "image-generation, reg"
            trained = f"trained for {config['steps']} steps"
            origin = "converted from the weights of SiT's authors (arXiv 2401.08740)" if layout == "sit" else trained
            labels = checkpoint_classes(checkpoint, config["num_classes"], ckpt).labels
            classes, call = f"{len(labels)}\nclasses", f"{list(labels[:3])}, {GUIDED}"
            if is_unconditional(config):
                classes, call = "trained without\nlabels", "num_images=3"
            known = {"model": "SiT", **config, "classes": classes, "call": call}
            file.write(CARD.format(**known, tags=tags, name=dest.name, origin=origin))
    return path


def describe(checkpoint: dict[str, Any], weights: str, source: str | Path) -> dict[str, Any]:
    """Return the configuration of an export, see `export_config`. Raises InputError if the checkpoint is not valid."""
    network, saved = network_config(checkpoint, weights, source), saved_settings(checkpoint, source)
    # The published checkpoints record no codec; one of other channels is named when images are generated.
    codec = saved.get("codec") or (SD_FORMAT.to_json() if network.in_channels == SD_FORMAT.channels else None)
    cfg_prob = 1.0 if is_unconditional(saved) else None
    saved = {**saved, "codec": codec, "steps": steps_done(checkpoint, source), "weights": weights, "cfg_prob": cfg_prob}
    classes = checkpoint_classes(checkpoint, network.num_classes, source).to_json() if "classes" in checkpoint else None
    return export_config(network, saved, classes)


if __name__ == "__main__":
    run_cli(main)
