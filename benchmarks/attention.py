"""Measures scaled dot-product attention: each of PyTorch's kernels, also with the heads padded to a larger size.

    python benchmarks/attention.py --device cuda --json attention.json

The sizes are those of SiT-XL/2 at 256 px in a step of 256 images. Heads of 72 values are not a size for which kernels
are made: some refuse it, some compute with 80, 96 or 128 values. In the padded forms zeros are appended to queries,
keys and values, and are removed from the result; the scale stays that of the true size, so the result is the same.
Their time contains the padding. FLOP/s count the true size: forward 4 N H T^2 D, backward 2.5 times as many.

The deviation is relative to attention in float32 by its definition, of the first images. The gradient is that of the
queries.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import timing
from common.checks import MAX_BATCH, POSITIVE, between
from common.cli import parse, setting
from common.errors import InputError, run_cli
from models.inference import NETWORK_DTYPES

BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
WIDTH = between(1, 1024)
CHOSEN = "PyTorch's choice"
COMPARED_IMAGES = 4  # the deviation is that of these images
WARM_UP = 3  # calls that are not measured
REASON_LENGTH = 90  # characters of the reason why a kernel refuses
COLUMNS = {
    "kernel": "{kernel}", "head size": "{head_size}", "forward, ms": "{forward_ms:.3f}",
    "quartiles": "{forward_quartiles[0]:.3f}, {forward_quartiles[1]:.3f}", "backward, ms": "{backward_ms:.3f}",
    "quartiles ": "{backward_quartiles[0]:.3f}, {backward_quartiles[1]:.3f}", "both, TFLOP/s": "{tflops:.1f}",
    "ratio": "{ratio:.2f}", "deviation, rms": "{rms_deviation:.1e}", "of the gradient": "{gradient_deviation:.1e}",
    "refused": "{refused}",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AttentionBenchmark(timing.Benchmark):
    """Settings of the benchmark."""

    batch_size: int = setting(256, "images", check=between(1, MAX_BATCH))
    heads: int = setting(16, "heads", check=WIDTH)
    tokens: int = setting(257, "tokens", check=between(1, 1_000_000))
    head_size: int = setting(72, "values of each head", check=WIDTH)
    padded: tuple[int, ...] = setting((80, 96, 128), "head sizes to pad to", check=WIDTH)
    dtype: str = setting("bf16", "precision", choices=tuple(NETWORK_DTYPES))
    repeats: int = setting(20, "timings of each form", check=POSITIVE)

    def check_combination(self) -> None:
        super().check_combination()
        for size in self.padded:
            if size <= self.head_size:
                raise InputError(f"--padded {size}: must be greater than --head-size {self.head_size}")


class Form(NamedTuple):
    """One row: a kernel, None for PyTorch's choice, and the size that it computes with."""

    kernel: str | None
    head_size: int


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    config = parse(AttentionBenchmark, "Measure scaled dot-product attention.", argv)
    device = config.torch_device
    inputs = make_inputs(config)
    chosen = chosen_kernel(*inputs)
    expected = attention_and_gradient(by_definition, [part[:COMPARED_IMAGES].detach().float() for part in inputs])
    result: dict[str, Any] = {"chosen": chosen, "rows": []}
    padded = [Form(kernel, size) for kernel, size in itertools.product(list(BACKENDS)[:-1], config.padded)]
    for form in [Form(None, config.head_size), *(Form(kernel, config.head_size) for kernel in BACKENDS), *padded]:
        result["rows"].append(measure(form, inputs, expected, config))
        add_ratios(result["rows"])
        timing.write_result(config.json, result, device)
    shape = f"({config.batch_size}, {config.heads}, {config.tokens}, {config.head_size}), {config.dtype}"
    print(f"{timing.hardware(device)}, torch {torch.__version__}, {shape}\n")
    print(timing.markdown_table(COLUMNS, result["rows"]))
    print(f"\nPyTorch chooses: {chosen}", flush=True)
    if measured := [row for row in result["rows"][1:] if "ratio" in row]:
        best = max(measured, key=lambda row: row["ratio"])
        print(f"fastest: {best['kernel']}, head size {best['head_size']}, {best['ratio']:.2f} times as fast")


def make_inputs(config: AttentionBenchmark) -> list[Tensor]:
    """Return queries, keys and values (N, H, T, D), in memory as the network's `Attention` has them."""
    generator = torch.Generator(config.torch_device).manual_seed(0)
    shape = (config.batch_size, config.tokens, 3, config.heads, config.head_size)
    qkv = torch.randn(shape, device=generator.device, dtype=NETWORK_DTYPES[config.dtype], generator=generator)
    return [part.requires_grad_() for part in qkv.permute(2, 0, 3, 1, 4).unbind(0)]


def chosen_kernel(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Return the kernel that PyTorch chooses."""
    number = torch._fused_sdp_choice(q, k, v)
    return next((name for name, backend in BACKENDS.items() if int(backend) == number), f"backend {number}")


def by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v."""
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


def padded_attention(head_size: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention computed with heads of `head_size` values."""
    true_size = q.shape[-1]
    if head_size == true_size:
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (F.pad(part, (0, head_size - true_size)) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=true_size**-0.5)[..., :true_size]


def attention_and_gradient(attention: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return attention (N, H, T, D), and the gradient of the sum of its squares / 2 with respect to the queries."""
    q, k, v = (part.detach().requires_grad_() for part in inputs)
    out = attention(q, k, v)
    return out.detach(), torch.autograd.grad(out, q, out.detach())[0]


def measure(
    form: Form, inputs: list[Tensor], expected: tuple[Tensor, Tensor], config: AttentionBenchmark
) -> dict[str, Any]:
    """Return the row of a form. If the kernel refuses, it has only the reason."""
    row: dict[str, Any] = {"kernel": form.kernel or CHOSEN, "head_size": form.head_size}
    run, device = partial(padded_attention, form.head_size), config.torch_device
    with sdpa_kernel(BACKENDS[form.kernel]) if form.kernel else contextlib.nullcontext():
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = attention_and_gradient(run, inputs)
        except RuntimeError as error:  # also if the memory is full
            return {**row, "refused": reason([str(warning.message) for warning in caught], str(error))}
        out = run(*inputs)
        backward = partial(torch.autograd.grad, out, inputs, torch.ones_like(out), retain_graph=True)
        for name, action in {"forward": lambda: run(*inputs), "backward": backward}.items():
            times = timing.repeated(action, device, WARM_UP + config.repeats)[WARM_UP:]
            low, row[f"{name}_ms"], high = (1000 * value for value in timing.quartiles(times))
            row[f"{name}_quartiles"] = [low, high]
    flops = 4 * config.batch_size * config.heads * config.tokens**2 * config.head_size * (1 + 2.5)
    row["tflops"] = flops / (row["forward_ms"] + row["backward_ms"]) / 1e9
    out_deviation, gradient_deviation = (
        timing.deviation(part[:COMPARED_IMAGES].float(), wanted) for part, wanted in zip(found, expected, strict=True)
    )
    return {**row, **out_deviation, "gradient_deviation": gradient_deviation["rms_deviation"]}


def reason(warned: list[str], error: str) -> str:
    """Return in short why PyTorch refused a kernel: its first warning about this kernel, else the error.

    The warnings also name the kernels that `sdpa_kernel` has disabled, and announce each reason by "not used because".
    """
    reasons = [line for line in warned if "because" not in line and "disabled" not in line]
    if not reasons and re.match("No (viable backend|available kernel)", error):
        return "not available on this device"
    first = (reasons or [error])[0].split(" (Triggered")[0]
    return " ".join(first.split())[:REASON_LENGTH].replace("|", "/")


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Set in each row how many times as fast as PyTorch's choice, the first row, its forward and backward pass are."""
    for row in rows:
        if "tflops" in row and "tflops" in rows[0]:
            row["ratio"] = row["tflops"] / rows[0]["tflops"]


if __name__ == "__main__":
    run_cli(main)
