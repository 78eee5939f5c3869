"""How fast sampling is: the published setting first, then each of our switches added in turn, all in one run.

    python benchmarks/sample.py --device cuda --model SiT-XL/2 --batch-size auto --dtype fp16 --json sample.json
    python benchmarks/sample.py --device cpu --model SiT-B/2 --batch-size 8 --dtype bf16 --no-decode

The published setting: float32 (on GPUs TF32), attention written out, projectors computed at every step, the time
embedded once for each image. Settings take turns, and medians are compared, so that whatever else the machine does
meets all alike. The last table is the price of REG's class slot: the same network with and without it, in pairs.
Without --ckpt the weights are random, spread like trained ones; deviations are then of the right size, no more.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.encode import sd_architecture
from benchmarks.timing import in_turns, matrix_rate, parse_with_json, peak_memory, seconds, write_result
from common.cli import AUTO, SWITCH, batch_size, check_batch_size
from common.distributed import largest_batch
from common.io import InputError, run_cli
from models.checkpoint import load_model
from models.inference import NETWORK_DTYPES, CudaGraphs, compile_blocks, convert
from models.interpolant import Interpolant
from models.sit import SiT, SiT_models
from samplers import Guidance, image_seeds, sample_images, sde_times

CLASS_WIDTH = 768  # of DINOv2-B's class token
LATENT_FACTOR = 8  # pixels to a latent, of Stable Diffusion's codec
LARGEST_BATCH = 256
DECODED_ON_CPU = 1  # image at a time there: it takes seconds


@dataclass(frozen=True)
class Setting:
    """One row: the network's module, and what is called in its place."""

    name: str
    model: SiT
    network: Callable[..., tuple]


@dataclass(frozen=True)
class Bench:
    """What all rows share: batch, labels and seeds, guidance, device."""

    args: argparse.Namespace
    device: torch.device

    @property
    def guidance(self) -> Guidance:
        """Guidance as the command line has it."""
        return Guidance(self.args.cfg_scale, self.args.cfg_scale, 0, self.args.guidance_high)

    def sample(self, setting: Setting, guidance: Guidance, num_steps: int, count: int | None = None) -> torch.Tensor:
        """Return the latents of a run of `num_steps`."""
        numbers = range(count or self.args.batch_size)
        labels = [number % setting.model.num_classes for number in numbers]
        seeds = image_seeds(0, numbers)
        return sample_images(
            setting.model, labels, seeds, Interpolant(), guidance, num_steps=num_steps, network=setting.network
        )[0]


def random_network(name: str, resolution: int, fused_attn: bool = True, cls_token_dim: int | None = CLASS_WIDTH) -> SiT:
    """Return a preset whose zero-initialised layers have weights, so that the output depends on everything."""
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


def build_settings(plain: SiT, args: argparse.Namespace) -> list[Setting]:
    """Return the rows; `plain` has attention written out."""
    fused = copy.deepcopy(plain)
    for block in fused.blocks:
        block.attn.fused_attn = True
    settings = [
        Setting("published setting", plain, as_published(plain)),
        Setting("+ fused attention", fused, as_published(fused)),
        Setting("+ no projectors, time once", fused, fused),
    ]
    if args.dtype != "float32":
        half = convert(copy.deepcopy(fused), NETWORK_DTYPES[args.dtype])
        settings.append(Setting(f"+ network in {args.dtype}", half, half))
    if args.compile:
        compiled = copy.deepcopy(settings[-1].model)
        compile_blocks(compiled)
        settings.append(Setting("+ compiled", compiled, compiled))
    if plain.pos_embed.device.type == "cuda":
        settings.append(Setting("+ CUDA graphs", settings[-1].model, CudaGraphs(settings[-1].model)))
    return settings


def network_flops(model: SiT) -> int:
    """Return the floating-point operations of one image through the network, counted, projectors left out."""
    model = copy.deepcopy(model).to("meta")
    x = torch.empty(1, model.in_channels, model.input_size, model.input_size, device="meta")
    t, y = torch.empty(1, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    cls_token = torch.empty(1, model.cls_token_dim, device="meta") if model.cls_token_dim else None
    with FlopCounterMode(display=False) as counter:
        model(x, t, y, cls_token=cls_token, project=False)
    return counter.get_total_flops()


def measure(bench: Bench, settings: list[Setting]) -> list[dict[str, Any]]:
    """Return a row for each setting: seconds of a step outside and inside the guidance interval, memory, deviation."""
    args = bench.args
    kinds = {"step_plain": Guidance(), "step_guided": Guidance(max(args.cfg_scale, 1.1))}
    memory, latents, runs = {}, {}, {}
    for setting in tqdm(settings, desc="first runs", unit="setting"):  # compiles, captures, and is not timed
        before = reset_memory(bench.device)
        latents[setting.name] = bench.sample(setting, bench.guidance, args.deviation_steps)
        for kind, guidance in kinds.items():
            runs[setting.name, kind] = partial(bench.sample, setting, guidance, args.timed_steps)
            runs[setting.name, kind]()
        weights = sum(tensor.nbytes for tensor in setting.model.state_dict().values()) / 1e9
        memory[setting.name] = peak_memory(bench.device) - before + weights if before else None
    times = in_turns(runs, bench.device, args.rounds)
    expected = latents[settings[0].name]
    rows = []
    for setting in settings:
        difference = latents[setting.name] - expected
        rows.append(
            {
                "setting": setting.name,
                **{kind: statistics.median(times[setting.name, kind]) / args.timed_steps for kind in kinds},
                "memory_gb": memory[setting.name],
                "max_deviation": difference.abs().max().item(),
                "rms_deviation": (difference.square().mean() / expected.square().mean()).sqrt().item(),
            }
        )
    return rows


def reset_memory(device: torch.device) -> float:
    """Start measuring a GPU's peak memory; return what is in use now, in GB. On a CPU, return 0."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 1e9


def add_rates(rows: list[dict[str, Any]], bench: Bench, flops: int, decode: float | None) -> None:
    """Add to each row images per second of the whole run, the ratio to the first, and the share of the ceiling."""
    args = bench.args
    times = sde_times(args.steps)[:-1].tolist()
    inside = sum(bench.guidance.active(t) for t in times)
    ceilings = {"float32": matrix_rate(bench.device, args.seconds)}
    if args.dtype != "float32":
        ceilings[args.dtype] = matrix_rate(bench.device, args.seconds, NETWORK_DTYPES[args.dtype])
    full = [row["setting"] for row in rows].index("+ no projectors, time once")
    for number, row in enumerate(rows):
        network = (inside * row["step_guided"] + (len(times) - inside) * row["step_plain"]) / args.batch_size
        ceiling = ceilings["float32" if number <= full else args.dtype]
        row["images_per_s"] = 1 / (network + (decode or 0))
        row["ratio"] = row["images_per_s"] / rows[0]["images_per_s"]
        row["utilisation"] = flops * (len(times) + inside) / network / ceiling


def decoding_seconds(bench: Bench) -> float | None:
    """Return the time of decoding one image by Stable Diffusion's architecture; None without diffusers."""
    if not bench.args.decode or importlib.util.find_spec("diffusers") is None:
        return None
    codec = sd_architecture().to(bench.device, memory_format=torch.channels_last)
    count = bench.args.batch_size if bench.device.type == "cuda" else DECODED_ON_CPU
    side = bench.args.resolution // LATENT_FACTOR
    latents = torch.randn(count, codec.format.channels, side, side, device=bench.device)
    return seconds(lambda: codec.decode(latents), bench.device, bench.args.seconds) / count


def class_slot_price(bench: Bench) -> dict[str, Any]:
    """Return what the class slot adds to FLOPs and to the time of a sampling run, as shares, in the fastest setting.

    The two networks take turns; each pair gives a ratio, and their median and quartiles are returned.
    """
    args = bench.args
    flops, fastest = [], []
    torch.compiler.reset()  # which keeps but a few compilations of one function
    for cls_token_dim in (None, CLASS_WIDTH):
        model = random_network(args.model, args.resolution, False, cls_token_dim).to(bench.device)
        flops.append(network_flops(model))
        fastest.append(build_settings(model, args)[-1])
        bench.sample(fastest[-1], bench.guidance, args.deviation_steps)  # compiles, captures
    runs = {which: partial(bench.sample, fastest[which], bench.guidance, args.deviation_steps) for which in (0, 1)}
    times = in_turns(runs, bench.device, args.pairs)
    ratios = [with_slot / without - 1 for without, with_slot in zip(times[0], times[1], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"flops": flops[1] / flops[0] - 1, "latency": quartiles[1], "latency_quartiles": quartiles[::2]}


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    args = result["settings"]
    print(
        f"{args['ckpt'] or args['model']}, {args['resolution']} px, batch {args['batch_size']}, "
        f"{result['gflop']:.1f} GFLOP a call and image; {result['hardware']}, torch {result['torch']}"
    )
    decode = "left out" if result["decode_seconds"] is None else f"{1000 * result['decode_seconds']:.1f} ms an image"
    print(f"{args['steps']} SDE steps, guidance {args['cfg_scale']} in [0, {args['guidance_high']}]; decoding {decode}")
    print(f"largest and root-mean-square deviation: of the latents after {args['deviation_steps']} steps\n")
    print("| setting | ms a step | guided | images/s | ratio | utilisation | memory, GB | deviation | rms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        memory = "" if row["memory_gb"] is None else f"{row['memory_gb']:.2f}"
        print(
            f"| {row['setting']} | {1000 * row['step_plain']:.1f} | {1000 * row['step_guided']:.1f} "
            f"| {row['images_per_s']:.4g} | {row['ratio']:.2f} | {row['utilisation']:.0%} | {memory} "
            f"| {row['max_deviation']:.1e} | {row['rms_deviation']:.1e} |"
        )
    if price := result["class_slot"]:
        low, high = price["latency_quartiles"]
        print(
            f"\nclass slot: {price['flops']:+.2%} FLOPs (paper: +0.38 %), {price['latency']:+.2%} latency "
            f"(paper: +0.49 %; quartiles of {args['pairs']} pairs: {low:+.2%}, {high:+.2%})"
        )
    print(f"peak memory {result['peak_memory_gb']:.2f} GB, of all settings together")


def parse_args() -> argparse.Namespace:
    """Return the settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="SiT-XL/2", choices=SiT_models, help="preset (%(default)s)")
    parser.add_argument("--ckpt", help="measure this trained network in place of random weights")
    parser.add_argument("--resolution", type=int, default=256, help="side of the images (%(default)s)")
    parser.add_argument("--batch-size", type=batch_size, default=64, help="images; auto: all that fit (%(default)s)")
    parser.add_argument("--steps", type=int, default=250, help="of the run that is reckoned with (%(default)s)")
    parser.add_argument("--cfg-scale", type=float, default=2.3, help="guidance of image and class token (%(default)s)")
    parser.add_argument("--guidance-high", type=float, default=0.85, help="guidance up to this time (%(default)s)")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device, help="(%(default)s)")
    parser.add_argument(
        "--dtype", default="bf16", choices=NETWORK_DTYPES, help="half precision; float32: none (%(default)s)"
    )
    parser.add_argument("--compile", action=SWITCH, default=True, help="measure the compiled network as well")
    parser.add_argument("--decode", action=SWITCH, default=True, help="reckon with decoding, if diffusers is there")
    parser.add_argument("--timed-steps", type=int, default=4, help="steps of each timing (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each setting (%(default)s)")
    parser.add_argument("--deviation-steps", type=int, default=10, help="steps before comparison (%(default)s)")
    parser.add_argument("--pairs", type=int, default=20, help="of the class slot's price; 0: leave out (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="least time of other measurements (%(default)s)")
    args = parse_with_json(parser)
    check_batch_size("--batch-size", args.batch_size)
    for name in ("steps", "timed_steps", "rounds", "deviation_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.resolution < 1 or args.resolution % LATENT_FACTOR:
        raise InputError(f"--resolution {args.resolution}: must be a multiple of {LATENT_FACTOR}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no CUDA device")
    return args


def main() -> None:
    """Run the program."""
    args = parse_args()
    bench = Bench(args, torch.device(args.device))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    if args.ckpt:
        plain = load_model(args.ckpt)
        for block in plain.blocks:
            block.attn.fused_attn = False
    else:
        plain = random_network(args.model, args.resolution, fused_attn=False)
    flops = network_flops(plain)
    plain = plain.to(bench.device)
    on_gpu = bench.device.type == "cuda"
    if args.batch_size == AUTO:
        first, guided = Setting("", plain, as_published(plain)), Guidance(2.0)
        args.batch_size = largest_batch(lambda n: bench.sample(first, guided, 1, n), LARGEST_BATCH) if on_gpu else 8
    rows = measure(bench, build_settings(plain, args))
    decode = decoding_seconds(bench)
    add_rates(rows, bench, flops, decode)
    result = {
        "hardware": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "gflop": flops / 1e9,
        "decode_seconds": decode,
        "rows": rows,
        "class_slot": class_slot_price(bench) if args.pairs else None,
        "peak_memory_gb": peak_memory(bench.device),
    }
    show(result)
    if args.json:
        write_result(args.json, result, bench.device)


if __name__ == "__main__":
    run_cli(main)
