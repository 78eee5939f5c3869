"""The settings of a set of samples: generate.py's flags, what they must satisfy, and what they say of the set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.cli import SWITCH, batch_size, check_batch_size, finite_float, flag, legacy_parse, uses_cuda
from common.io import InputError
from models.autoencoder import LatentFormat
from models.checkpoint import is_legacy, saved_settings, steps_done
from models.inference import NETWORK_DTYPES
from models.interpolant import PATHS
from models.sit import PATCH_SIZES, PRESETS, SiT
from samplers import MODES, SOLVERS, derive_seed

LABEL_STREAM = 2  # keeps the draw of an image's label apart from everything else that comes from the seed


def _files_flags(add: Callable) -> None:
    add("--ckpt", required=True, help="checkpoint, of this or of the published code")
    add("--weights", default="ema", choices=["ema", "model"], help="which weights of it (%(default)s)")
    add("--sample-dir", default="samples", help="folder of all sets of samples (%(default)s)")
    add("--name", help="folder of this set in --sample-dir; default: made of the settings")
    add("--npz", action=SWITCH, default=True, help="also write samples.npz")
    add("--save-cls", action=SWITCH, default=False, help="also write the generated class tokens, cls_tokens.npy (N, D)")
    add("--coherence", help="training data: also write how well class tokens agree with their images, coherence.json")
    add("--enc-weights", help="weights file of the encoder that --coherence asks; default: the run's")


def _content_flags(add: Callable) -> None:
    add("--num-fid-samples", type=int, default=50_000, help="number of images (%(default)s)")
    add(
        "--label-sampling", default="random", choices=["random", "balanced"], help="how labels are chosen (%(default)s)"
    )
    add("--classes", help="only these classes, comma-separated; default: all")
    add("--global-seed", type=int, default=0, help="of noise and labels (%(default)s)")


def _sampler_flags(add: Callable) -> None:
    add("--mode", default="sde", choices=MODES, help="SDE (Euler-Maruyama) or ODE (%(default)s)")
    add("--num-steps", type=int, default=250, help="steps of the solver (%(default)s)")
    add("--solver", default="euler", choices=SOLVERS, help="of the ODE; dopri5 chooses its steps itself (%(default)s)")
    add("--heun", action=SWITCH, default=False, help="the same as --solver heun")
    add(
        "--cfg-scale",
        type=finite_float,
        default=1.0,
        help="guidance of the image; above 1 it switches guidance on, for the class token as well (%(default)s)",
    )
    add(
        "--cls-cfg-scale",
        type=finite_float,
        help="guidance of the class token while --cfg-scale is above 1; 0: none; default: as --cfg-scale",
    )
    add("--guidance-low", type=finite_float, default=0.0, help="guidance from this time on, 0 is data (%(default)s)")
    add("--guidance-high", type=finite_float, default=1.0, help="guidance up to this time, 1 is noise (%(default)s)")


def _machine_flags(add: Callable) -> None:
    add(
        "--per-proc-batch-size",
        type=batch_size,
        default=32,
        help="images at a time on each process (%(default)s); auto: as many as the GPU's memory holds",
    )
    add("--mixed-precision", default="no", choices=["no", "fp16", "bf16"], help="autocast of the network (%(default)s)")
    add(
        "--network-dtype",
        default="float32",
        choices=NETWORK_DTYPES,
        help="the network's weights and arithmetic; the sampler's state is float64 (%(default)s)",
    )
    add("--compile", action=SWITCH, default=False, help="compile the network's blocks; takes a minute at first")
    add("--cuda-graphs", action=SWITCH, default=False, help="replay network calls as CUDA graphs: for small batches")
    add("--tf32", action=SWITCH, default=True, help="TF32 in matrix products of CUDA")
    add("--fused-attn", action=SWITCH, default=True, help="attention through scaled_dot_product_attention")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where; auto: CUDA if there is one")
    add("--local-rank", type=int, help="index of the process on its machine, as old launchers pass it; picks its GPU")


def _checkpoint_flags(add: Callable) -> None:
    add("--model", help="SiT-XL/2 and so on")
    add("--num-classes", type=int, help="number of classes")
    add("--encoder-depth", type=int, help="the block the projectors read after")
    add("--resolution", type=int, help="image size in px")
    add("--qk-norm", action=SWITCH, help="LayerNorm on queries and keys")
    add("--projector-embed-dims", help="widths of the aligned encoders, comma-separated")
    add("--cls", type=int, help="width of the class token; 0: no class slot")
    add("--path-type", choices=PATHS, help="path between data and noise")
    add("--legacy", action=SWITCH, help="the older REPA layout")
    add(
        "--vae",
        help="codec that decodes, or ema, mse for Stable Diffusion's; default: the latents' own (for these, ema)",
    )


FLAGS = {
    "files": _files_flags,
    "what to generate": _content_flags,
    "sampler": _sampler_flags,
    "machine": _machine_flags,
    "known from the checkpoint; given, they are checked against it": _checkpoint_flags,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the settings; names and meanings of the published flags are kept."""
    args = legacy_parse("Generate images from a checkpoint.", FLAGS, argv)
    _check_args(args)
    return args


def _check_args(args: argparse.Namespace) -> None:
    check_batch_size("--per-proc-batch-size", args.per_proc_batch_size)
    for name in ("num_fid_samples", "num_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"{flag(name)} {getattr(args, name)}: must be 1 or greater")
    if args.global_seed < 0:
        raise InputError(f"--global-seed {args.global_seed}: must be 0 or greater")
    _check_guidance(args)
    if args.heun and args.solver == "dopri5":
        raise InputError("--heun contradicts --solver dopri5")
    args.solver = "heun" if args.heun else args.solver
    args.save_cls = args.save_cls or args.coherence is not None
    if args.mode == "sde" and args.solver != "euler":
        raise InputError(f"--solver {args.solver} is a solver of the ODE; add --mode ode")
    on_cuda = uses_cuda(args.device)
    for name, full in (("mixed_precision", "no"), ("network_dtype", "float32")):
        if getattr(args, name) == "fp16" and not on_cuda:
            raise InputError(f"{flag(name)} fp16 needs a CUDA device; allowed on the CPU: {full}, bf16")
    if args.cuda_graphs and not on_cuda:
        raise InputError("--cuda-graphs needs a CUDA device")
    if args.mixed_precision != "no" and (args.network_dtype != "float32" or args.cuda_graphs):
        other = "--cuda-graphs" if args.cuda_graphs else f"--network-dtype {args.network_dtype}"
        raise InputError(f"--mixed-precision {args.mixed_precision} does not go with {other}; allowed with it: no")


def _check_guidance(args: argparse.Namespace) -> None:
    if args.cfg_scale < 1:
        raise InputError(f"--cfg-scale {args.cfg_scale}: must be 1, for no guidance, or greater")
    if args.cls_cfg_scale is None:
        args.cls_cfg_scale = args.cfg_scale
    for name in ("guidance_low", "guidance_high"):
        if not 0 <= getattr(args, name) <= 1:
            raise InputError(f"{flag(name)} {getattr(args, name)}: is a time, must be from 0 to 1")
    if args.guidance_low > args.guidance_high:
        raise InputError(f"--guidance-low {args.guidance_low} is above --guidance-high {args.guidance_high}")


def warn_of_idle_scale(args: argparse.Namespace) -> None:
    """Say on stderr that a scale of the class token does nothing.

    No error: the published sampler takes it so, and its command lines must go on giving the images they gave.
    """
    if args.cls_cfg_scale > 1 >= args.cfg_scale:
        print(
            f"warning: --cls-cfg-scale {args.cls_cfg_scale:g} does nothing: only --cfg-scale above 1 switches guidance "
            f"on, and it is {args.cfg_scale:g}",
            file=sys.stderr,
        )


def image_labels(args: argparse.Namespace, num_classes: int) -> list[int]:
    """Return the label of each image: by its number alone, so that more images do not change the first ones."""
    pool = list(range(num_classes))
    if args.classes is not None:
        try:
            pool = [int(text) for text in args.classes.split(",")]
        except ValueError as error:
            raise InputError(f"--classes {args.classes!r}: expected whole numbers, comma-separated") from error
        if outside := [label for label in pool if not 0 <= label < num_classes]:
            raise InputError(f"--classes {outside[0]}: the checkpoint has classes 0 .. {num_classes - 1}")
    numbers = range(args.num_fid_samples)
    if args.label_sampling == "balanced":
        return [pool[number % len(pool)] for number in numbers]
    return [pool[derive_seed(args.global_seed, LABEL_STREAM, number) % len(pool)] for number in numbers]


def check_against_checkpoint(
    args: argparse.Namespace, checkpoint: dict[str, Any], model: SiT, latent_format: LatentFormat
) -> None:
    """Raise InputError, naming both values, for a flag that contradicts the checkpoint."""
    saved = saved_settings(checkpoint, args.ckpt)
    shape = (len(model.blocks), model.pos_embed.shape[-1])
    presets = {f"SiT-{size}/{patch}": (*PRESETS[size][:2], patch) for size in PRESETS for patch in PATCH_SIZES}
    if args.model is not None and presets.get(args.model) != (*shape, model.patch_size):
        name = saved.get("model", f"depth {shape[0]}, width {shape[1]}, patch {model.patch_size}")
        raise InputError(f"--model is {args.model}, but {args.ckpt} holds {name}")
    found = {
        "num_classes": model.num_classes,
        "encoder_depth": model.encoder_depth if len(model.projectors) else None,
        "resolution": model.input_size * latent_format.factor,
        "qk_norm": isinstance(model.blocks[0].attn.q_norm, torch.nn.LayerNorm),
        "projector_embed_dims": ",".join(str(projector[-1].out_features) for projector in model.projectors),
        "cls": model.cls_token_dim or 0,
        "path_type": saved.get("path_type"),
        "legacy": is_legacy(checkpoint),
    }
    for name, value in found.items():
        given = getattr(args, name)
        if given is not None and value is not None and given != value:
            raise InputError(f"{flag(name)} is {given}, but {args.ckpt} has {value}")
    if args.save_cls and model.cls_token_dim is None:
        raise InputError(f"--save-cls: {args.ckpt} has no class slot")


def default_name(args: argparse.Namespace, checkpoint: dict[str, Any]) -> str:
    """Return a folder name made of what distinguishes sets of samples.

    The run's name comes from a stranger's file, so its last part alone counts: nothing is written outside --sample-dir.
    """
    run = saved_settings(checkpoint, args.ckpt).get("exp_name")
    run = Path(run if isinstance(run, str) and run.isprintable() else "").name or Path(args.ckpt).stem
    steps = "" if args.solver == "dopri5" else f"-{args.num_steps}"
    solver = args.mode if args.mode == "sde" else f"ode-{args.solver}"
    interval = f"{args.guidance_low:g}-{args.guidance_high:g}"
    guidance = f"cfg-{args.cfg_scale:g}-cls-{args.cls_cfg_scale:g}-at-{interval}" if args.cfg_scale > 1 else "no-cfg"
    weights = f"{run}-{steps_done(checkpoint, args.ckpt):07d}-{args.weights}"
    return f"{weights}-{solver}{steps}-{guidance}-{args.label_sampling}-labels-seed-{args.global_seed}"
