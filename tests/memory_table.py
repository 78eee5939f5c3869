"""The table of README.md that says how a step is divided on GPUs of several sizes: `python -m tests.memory_table`."""

from __future__ import annotations

import functools
from dataclasses import replace

from models.autoencoder import SD_FORMAT
from models.sit import SiTConfig
from training.config import find_facts, parse_args
from training.limits import StepMemory, step_memory

GIB = 2**30
# GiB that PyTorch reports for RTX 4090, A100 of 40 GB, A100 and H100 of 80 GB, H200.
CARDS = {"24 GB": 23.5, "40 GB": 39.4, "80 GB": 79.1, "141 GB": 139.8}
CUDA_CONTEXT = GIB // 2
LOADED = 700_000_000  # bytes of DINOv2-B and of the decoder, float32
BATCH = 256


def network_of(model: str, resolution: int) -> SiTConfig:
    """Return the network that train.py builds with its defaults for ImageNet and DINOv2-B."""
    config = parse_args(["--exp-name", "x", "--device", "cpu", "--model", model])
    latents = resolution // 8
    return find_facts(config, resolution, latents, 1000, SD_FORMAT, [768]).network


@functools.cache
def memory_of_step(model: str, resolution: int, compiled: bool) -> StepMemory:
    """Return the memory of a step of BATCH samples on one GPU in fp16."""
    network = network_of(model, resolution)
    return step_memory(network, "fp16", compiled, True, "cuda", samples=BATCH, loaded=LOADED)


def chosen(model: str, resolution: int, card: str, checkpointing: bool = False, compiled: bool = False) -> int:
    """Return the images of a micro-batch that train.py chooses; 0 if one image does not fit."""
    memory = replace(memory_of_step(model, resolution, compiled), checkpointing=checkpointing)
    parts = memory.fewest_micro_batches(round(CARDS[card] * GIB) - CUDA_CONTEXT)
    return 0 if parts is None else BATCH // parts


def table() -> str:
    """Return the table in Markdown: images of a micro-batch, and after the slash those with --compile."""
    titles = [f"{card}{how}" for card in CARDS for how in ("", ", checkpointing")]
    lines = ["| network, px | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for resolution in (256, 512):
        for size in ("S", "B", "L", "XL"):
            where = [(f"SiT-{size}/2", resolution, card, how) for card in CARDS for how in (False, True)]
            cells = [f"{chosen(*place)} / {chosen(*place, compiled=True)}" for place in where]
            lines.append(f"| {size}/2, {resolution} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
