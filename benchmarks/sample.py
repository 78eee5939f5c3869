"""Measures how fast sampling is: the published setting, then with one optimization after the other, in one run.

    python benchmarks/sample.py --device cuda --model SiT-XL/2 --batch-size auto --dtype fp16 --json sample.json
    python benchmarks/sample.py --device cpu --model SiT-B/2 --batch-size 8 --dtype bf16

The published setting is float32 (TF32 on GPUs), attention without the fused kernel, projectors computed in every step,
and the time embedded once for each image. The forms take turns, and medians are compared, so that other load affects
all of them. The last table is the price of REG's class slot: the same network with and without it, in pairs. Without
--ckpt the weights are random, with the spread of trained ones; the deviations then have only the right magnitude.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import timing
from common.checks import AUTO, BATCH_SIZE, GUIDANCE_SCALE, NON_NEGATIVE, POSITIVE, UNIT_INTERVAL, Check
from common.cli import batch_size, parse, setting
from common.distributed import largest_batch
from common.errors import InputError, run_cli
from common.progress import progress_bar
from models.checkpoint import load_model
from models.inference import NETWORK_DTYPES, CudaGraphs, compile_blocks, convert
from models.interpolant import Interpolant
from models.sit import SiT, SiT_models
from samplers import Guidance, image_seeds, sample_images, sde_times

CLASS_WIDTH = 768  # of DINOv2-B's class token
LATENT_FACTOR = 8  # pixels of the image for one of the latents, Stable Diffusion's codec
LARGEST_BATCH = 256
KINDS = ("step_plain", "step_guided")  # steps outside and inside the guidance interval
MULTIPLE = Check(f"a multiple of {LATENT_FACTOR}", lambda value: value > 0 and value % LATENT_FACTOR == 0)


@dataclass(frozen=True, kw_only=True)
class Sample(timing.TimedBenchmark):
    """Settings of the benchmark."""

    model: str = setting("SiT-XL/2", "preset", choices=tuple(SiT_models))
    ckpt: str | None = setting(None, "checkpoint of a trained network; default: random weights")
    resolution: int = setting(256, "side of the images, px", check=MULTIPLE)
    batch_size: int | str = setting(64, "images at a time; auto: the most that fit", check=BATCH_SIZE, parse=batch_size)
    steps: int = setting(250, "steps of the complete run that images/s refers to", check=POSITIVE)
    cfg_scale: float = setting(2.3, "guidance of image and class token", check=GUIDANCE_SCALE)
    guidance_high: float = setting(0.85, "end of the guidance interval [0, t]", check=UNIT_INTERVAL)
    dtype: str = setting("bf16", "half precision to measure; float32: none", choices=tuple(NETWORK_DTYPES))
    compile: bool = setting(True, "also measure the compiled network")
    timed_steps: int = setting(4, "steps of each timing", check=POSITIVE)
    rounds: int = setting(5, "timings of each form", check=POSITIVE)
    deviation_steps: int = setting(10, "steps before latents are compared", check=POSITIVE)
    pairs: int = setting(20, "pairs of runs for the price of the class slot; 0: do not measure it", check=NON_NEGATIVE)
    matrix_seconds: float = setting(3, "time of the matrix product", check=NON_NEGATIVE)

    def check_combination(self) -> None:
        super().check_combination()
        if self.ckpt is None and (self.resolution // LATENT_FACTOR) % (patch := int(self.model.rsplit("/")[1])):
            raise InputError(
                f"--resolution {self.resolution}: --model {self.model} needs a multiple of {LATENT_FACTOR * patch}"
            )

    @property
    def guidance(self) -> Guidance:
        """Guidance of the complete run."""
        return Guidance(self.cfg_scale, self.cfg_scale, 0, self.guidance_high)


class Form(NamedTuple):
    """One row: the network, the function that is called in its place, and the precision of its matrix products."""

    name: str
    model: SiT
    network: Callable[..., tuple]
    dtype: str = "float32"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the tables."""
    start = time.perf_counter()
    config = parse(Sample, "Measure how fast sampling is.", argv)
    device = config.torch_device
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    if config.ckpt:
        plain = load_model(config.ckpt)
        for block in plain.blocks:
            block.attn.fused_attn = False
    else:
        plain = random_network(config.model, config.resolution, fused_attn=False)
    flops = network_flops(plain)
    plain = plain.to(device)
    if config.batch_size == AUTO:
        count = 8
        if device.type == "cuda":
            first, guided = Form("", plain, as_published(plain)), Guidance(2.0)
            count = largest_batch(lambda n: sample(replace(config, batch_size=n), first, guided, 1), LARGEST_BATCH)
        config = replace(config, batch_size=count)
    result = {
        "settings": {name: value for name, value in asdict(config).items() if name != "json"},
        "gflop": flops / 1e9,
    }

    def report(rows: list[dict[str, Any]], class_slot: dict[str, Any] | None = None) -> None:
        result.update(rows=rows, class_slot=class_slot, peak_memory_gb=timing.peak_memory(device))
        timing.write_result(config.json, result, device)

    rows = measure(config, build_forms(plain, config), flops, config.until(start), report)
    report(rows, class_slot_price(config) if config.pairs else None)
    show(result)


def sample(config: Sample, form: Form, guidance: Guidance, num_steps: int) -> torch.Tensor:
    """Return the latents of a batch after `num_steps` steps."""
    model, numbers = form.model, range(config.batch_size)
    labels, seeds = [number % model.num_classes for number in numbers], image_seeds(0, numbers)
    return sample_images(model, labels, seeds, Interpolant(), guidance, num_steps=num_steps, network=form.network)[0]


def random_network(name: str, resolution: int, fused_attn: bool = True, cls_token_dim: int | None = CLASS_WIDTH) -> SiT:
    """Return a preset with random weights in the layers that start at zero, so that every layer affects the output."""
    torch.manual_seed(0)
    model = SiT_models[name](
        input_size=resolution // LATENT_FACTOR, fused_attn=fused_attn, z_dims=[CLASS_WIDTH], cls_token_dim=cls_token_dim
    )
    for layer in [*model.blocks, model.final_layer]:
        nn.init.normal_(layer.adaLN_modulation[1].weight, std=0.02)
        nn.init.normal_(layer.adaLN_modulation[1].bias, std=0.3)
    for linear in (model.final_layer.linear, *([model.final_layer.linear_cls] if cls_token_dim else [])):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    return model.eval().requires_grad_(False)


def as_published(model: SiT) -> Callable[..., tuple]:
    """Return the network as the published sampler calls it."""

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, **more: Any) -> tuple:
        return model(x, t.expand(len(x)), y, **{**more, "project": True})

    return network


def build_forms(plain: SiT, config: Sample) -> list[Form]:
    """Return the rows. `plain` has no fused attention."""
    fused = copy.deepcopy(plain)
    for block in fused.blocks:
        block.attn.fused_attn = True
    forms = [
        Form("published setting", plain, as_published(plain)),
        Form("+ fused attention", fused, as_published(fused)),
        Form("+ no projectors, time once", fused, fused),
    ]
    if config.dtype != "float32":
        half = convert(copy.deepcopy(fused), NETWORK_DTYPES[config.dtype])
        forms.append(Form(f"+ network in {config.dtype}", half, half, config.dtype))
    if config.compile:
        compiled = copy.deepcopy(forms[-1].model)
        compile_blocks(compiled)
        forms.append(Form("+ compiled", compiled, compiled, config.dtype))
    if plain.pos_embed.device.type == "cuda":
        forms.append(Form("+ CUDA graphs", forms[-1].model, CudaGraphs(forms[-1].model), config.dtype))
    return forms


def network_flops(model: SiT) -> int:
    """Return the floating-point operations of one image through the network, counted, without projectors."""
    model = copy.deepcopy(model).to("meta")
    x = torch.empty(1, model.in_channels, model.input_size, model.input_size, device="meta")
    t, y = torch.empty(1, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    cls_token = torch.empty(1, model.cls_token_dim, device="meta") if model.cls_token_dim else None
    return timing.count_flops(lambda: model(x, t, y, cls_token=cls_token, project=False))


def measure(
    config: Sample, forms: list[Form], flops: int, until: float | None, report: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Return the rows of all forms, see `make_rows`. `report` gets the rows so far after each form and each round.

    flops: floating-point operations of a call of the network for one image. `until`: see `timing.rounds_until`.
    """
    device = config.torch_device
    scales = {KINDS[0]: Guidance(), KINDS[1]: Guidance(max(config.cfg_scale, 1.1))}
    dtypes = {form.dtype for form in forms}
    ceilings = {dtype: timing.matrix_rate(device, config.matrix_seconds, NETWORK_DTYPES[dtype]) for dtype in dtypes}
    runs, first, about, latents = {}, {}, {}, {}

    def rows(times: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
        return make_rows(config, [form for form in forms if form.name in about], times, about, flops, ceilings)

    for form in progress_bar(forms, desc="first runs", unit="form"):  # includes compilation and capture
        before = 0.0
        if device.type == "cuda":
            timing.reset_peak_memory(device)
            before = torch.cuda.memory_allocated() / 1e9
        latents[form.name] = sample(config, form, config.guidance, config.deviation_steps)
        for kind, guidance in scales.items():
            run = runs[form.name, kind] = partial(sample, config, form, guidance, config.timed_steps)
            run()
            first[form.name, kind] = [timing.timed(run, device)]
        weights = sum(tensor.nbytes for tensor in form.model.state_dict().values()) / 1e9
        memory = timing.peak_memory(device) - before + weights if device.type == "cuda" else None
        change = timing.deviation(latents[form.name], latents[forms[0].name])
        about[form.name] = {"memory_gb": memory, **change}
        report(found := rows(first))
        print(f"{form.name}: {found[-1]['images_per_s']:.4g} images/s", flush=True)
    return rows(timing.in_turns(runs, device, config.rounds, until, lambda times: report(rows(times))))


def make_rows(
    config: Sample,
    forms: list[Form],
    times: dict[tuple[str, str], list[float]],
    about: dict[str, dict[str, Any]],
    flops: int,
    ceilings: dict[str, float],
) -> list[dict[str, Any]]:
    """Return one row for each form: seconds of a step outside and inside the guidance interval, and for the complete
    run images per second, their ratio to the first row, and the utilisation.

    Args:
        times: seconds of --timed-steps steps, by form and kind of step.
        about: further entries of the row of each form.
        flops: as for `measure`.
        ceilings: floating-point operations per second of a matrix product, by dtype.
    """
    calls = sde_times(config.steps)[:-1].tolist()
    inside = sum(config.guidance.active(t) for t in calls)
    rows: list[dict[str, Any]] = []
    for form in forms:
        spread = {kind: timing.quartiles(times[form.name, kind]) for kind in KINDS}
        spread = {kind: [value / config.timed_steps for value in values] for kind, values in spread.items()}
        step = {kind: median for kind, (_, median, _) in spread.items()}
        network = (inside * step["step_guided"] + (len(calls) - inside) * step["step_plain"]) / config.batch_size
        rows.append({
            "setting": form.name,
            **step,
            **{f"{kind}_quartiles": [low, high] for kind, (low, _, high) in spread.items()},
            "images_per_s": 1 / network,
            "ratio": 1 / network / rows[0]["images_per_s"] if rows else 1.0,
            "utilisation": flops * (len(calls) + inside) / network / ceilings[form.dtype],
            **about[form.name],
        })  # fmt: skip
    return rows


def class_slot_price(config: Sample) -> dict[str, Any]:
    """Return the relative increase in FLOPs and in time of a sampling run that the class slot causes.

    Both networks have all optimizations and take turns. Each pair gives a ratio; median and quartiles are returned.
    """
    device, flops, runs = config.torch_device, [], {}
    torch.compiler.reset()  # it keeps only a few versions of a compiled function
    for cls_token_dim in (None, CLASS_WIDTH):
        model = random_network(config.model, config.resolution, False, cls_token_dim).to(device)
        flops.append(network_flops(model))
        fastest = build_forms(model, config)[-1]
        runs[cls_token_dim] = partial(sample, config, fastest, config.guidance, config.deviation_steps)
        runs[cls_token_dim]()  # compiles and captures
    times = timing.in_turns(runs, device, config.pairs)
    ratios = [slot / none - 1 for none, slot in zip(*times.values(), strict=True)]
    low, median, high = timing.quartiles(ratios)
    return {"flops": flops[1] / flops[0] - 1, "latency": median, "latency_quartiles": [low, high]}


def show(result: dict[str, Any]) -> None:
    """Print the settings, the table, and the price of the class slot."""
    print(", ".join(f"{name} {value}" for name, value in result["settings"].items()))
    print(f"one image: {result['gflop']:.1f} GFLOP for a call; without decoding, which encode.py measures")
    print("deviation (largest, root mean square): of the latents after --deviation-steps steps\n")
    columns = {
        "setting": "{setting}", "s a step": "{step_plain:.4f}", "guided": "{step_guided:.4f}",
        "quartiles": "{step_guided_quartiles[0]:.4f}, {step_guided_quartiles[1]:.4f}",
        "images/s": "{images_per_s:.4g}", "ratio": "{ratio:.2f}", "utilisation": "{utilisation:.0%}",
        "memory, GB": "{memory_gb:.2f}", "deviation": "{max_deviation:.1e}", "rms": "{rms_deviation:.1e}",
    }  # fmt: skip
    print(timing.markdown_table(columns, result["rows"]))
    if price := result["class_slot"]:
        low, high = price["latency_quartiles"]
        print(f"\nclass slot: {price['flops']:+.2%} FLOPs, {price['latency']:+.2%} latency; paper: +0.38 %, +0.49 %")
        print(f"quartiles of the latency over --pairs pairs: {low:+.2%}, {high:+.2%}")
    print(f"peak memory of all forms together: {result['peak_memory_gb']:.2f} GB")


if __name__ == "__main__":
    run_cli(main)
