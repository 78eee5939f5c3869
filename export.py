"""Write the network of a checkpoint for others: weights and configuration, without the training run.

    python export.py --ckpt exps/NAME/checkpoints/0400000.pt --dest reg-xl.safetensors
    python export.py --ckpt exps/NAME/checkpoints/0400000.pt --dest reg-xl

A file holds both in one; a folder is laid out as on the Hugging Face hub, and `pipeline.REGPipeline.from_pretrained`
generates from it. Every program here takes either in the place of a checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common.io import InputError, atomic_write, check_writable, run_cli
from models.autoencoder import SD_FORMAT
from models.checkpoint import (
    architecture,
    build_model,
    load_checkpoint,
    network_weights,
    saved_settings,
    steps_done,
    stored_weights,
)
from models.safetensors_format import CONFIG_FILE, write_network

# What of a run's settings a user of the network needs, besides its architecture.
KEPT_SETTINGS = ("model", "path_type", "resolution", "enc_type", "exp_name")
CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [{tags}]
---
# {name}

A {model} denoising transformer of the REG family ([arXiv 2507.01467](https://arxiv.org/abs/2507.01467)), {classes}
classes, trained for {steps} steps; {weights} weights. Written by `export.py`; with the code of that repository:

```python
from models.pipeline import REGPipeline

images = REGPipeline.from_pretrained("{name}")([0, 1, 2], guidance_scale=2.3, guidance_interval=(0, 0.85)).images
```
"""


def main() -> None:
    """Export as the command line says."""
    parser = argparse.ArgumentParser(description="Write the network of a checkpoint for others.", allow_abbrev=False)
    parser.add_argument("--ckpt", required=True, help="checkpoint, of this or of the published code")
    parser.add_argument("--dest", required=True, help="a .safetensors file, or a new folder in the hub's layout")
    parser.add_argument("--weights", default="ema", choices=["ema", "model"], help="which weights of it (%(default)s)")
    args = parser.parse_args()
    export(args.ckpt, args.dest, args.weights)
    print(args.dest)


def export(ckpt: str | Path, dest: str | Path, weights: str = "ema") -> None:
    """Write the network of a checkpoint to a .safetensors file or a folder.

    Raises:
        InputError: the checkpoint holds no such network, or there is something at `dest` already, or nothing can be
            written there.
    """
    dest = Path(dest)
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise InputError(f"--dest {dest}: there is something already; choose another name")
    check_writable(dest if dest.suffix == ".safetensors" else dest / CONFIG_FILE, "--dest")
    checkpoint = load_checkpoint(ckpt)
    build_model(checkpoint, weights, source=ckpt)  # only what can be read again is written
    config = describe(checkpoint, weights, ckpt)
    write_network(dest, network_weights(checkpoint, weights, ckpt), config)
    if dest.suffix != ".safetensors":
        with atomic_write(dest / "README.md", "w") as file:
            tags = "image-generation" if config["cls_token_dim"] is None else "image-generation, reg"
            name, classes = dest.name, config["num_classes"]
            model, steps = config.get("model", "SiT"), config["steps"]
            file.write(CARD.format(tags=tags, name=name, model=model, classes=classes, steps=steps, weights=weights))


def describe(checkpoint: dict[str, Any], weights: str, source: str | Path) -> dict[str, Any]:
    """Return the configuration that rebuilds a checkpoint's network and decodes what it generates, as JSON has it."""
    saved = saved_settings(checkpoint, source)
    return {
        "_class_name": "SiT",
        **architecture(stored_weights(checkpoint, weights, source), saved, source),
        **{name: saved[name] for name in KEPT_SETTINGS if saved.get(name) is not None},
        "codec": saved.get("codec") or SD_FORMAT.to_json(),
        "steps": steps_done(checkpoint, source),
        "weights": weights,
    }


if __name__ == "__main__":
    run_cli(main)
