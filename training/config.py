"""The settings of a training run: train.py's flags, what they must satisfy, and which of them say what run it is."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.cli import SWITCH, finite_float, flag, legacy_parse, uses_cuda
from common.io import InputError
from loss import ENTANGLED, FROM_ENCODER
from models.interpolant import PATHS, WEIGHTINGS
from models.sit import SiT_models

MINUTES_OF_A_YEAR = 525_600
# Flags by the numbers they take.
ABOVE_0 = """
    batch_size max_train_steps epochs gradient_accumulation_steps log_steps checkpointing_steps learning_rate
    max_grad_norm grid_samples grid_num_steps projector_dim eval_samples eval_num_steps eval_batch_size retry_steps
    max_bad_steps timeout_minutes depth hidden_size num_heads encoder_depth num_classes
"""
FROM_0 = """
    sampling_steps resume_step seed num_workers proj_coeff cls adam_weight_decay adam_epsilon keep_last keep_every
    eval_steps
"""
BELOW_1 = "ema_decay cfg_prob adam_beta1 adam_beta2"
# What may differ between a run and its continuation; everything else says which run it is.
MAY_CHANGE = {
    "output_dir", "exp_name", "logging_dir", "report_to", "sampling_steps", "resume_step", "resume", "init_from",
    "data_dir", "allow_tf32", "mixed_precision", "epochs", "max_train_steps", "checkpointing_steps", "fused_attn",
    "num_workers", "gradient_accumulation_steps", "log_steps", "check_data", "device", "enc_weights", "vae",
    "grid_samples", "grid_num_steps", "grid_cfg_scale", "eval_steps", "eval_ref", "eval_samples", "eval_num_steps",
    "eval_batch_size", "eval_inception", "legacy", "keep_last", "keep_every", "background_save", "retry_steps",
    "max_bad_steps", "timeout_minutes", "fsdp", "compile", "activation_checkpointing",
}  # fmt: skip


def _run_flags(add: Callable) -> None:
    add("--output-dir", default="exps", help="folder of all runs (%(default)s)")
    add("--exp-name", required=True, help="name of this run, its folder in --output-dir")
    add("--logging-dir", default="logs", help="the tracker's folder inside the run's folder (%(default)s)")
    add(
        "--report-to",
        default="none",
        choices=["none", "wandb", "tensorboard"],
        help="tracker beside our own files (%(default)s)",
    )
    add(
        "--log-steps",
        type=int,
        default=100,
        help="steps between two rows of metrics.jsonl (%(default)s)",
    )
    add("--checkpointing-steps", type=int, default=50_000, help="steps between two checkpoints (%(default)s)")
    add("--keep-last", type=int, default=0, help="keep so many of the newest checkpoints; 0: all (%(default)s)")
    add(
        "--keep-every",
        type=int,
        default=0,
        help="besides, keep those of every so many steps; 0: none (%(default)s)",
    )
    add(
        "--background-save",
        action=SWITCH,
        default=True,
        help="write checkpoints while training goes on, from a copy (%(default)s)",
    )
    add(
        "--retry-steps",
        type=int,
        default=100,
        help="after a checkpoint that could not be written, try again so many steps later (%(default)s)",
    )
    add(
        "--max-bad-steps",
        type=int,
        default=20,
        help="stop after so many in a row without a finite gradient (%(default)s)",
    )
    add(
        "--timeout-minutes",
        type=finite_float,
        default=30,
        help="how long processes wait for one that has died (%(default)s)",
    )
    add("--resume-step", type=int, default=0, help="go on from the checkpoint of this step; 0: start anew")
    add("--resume", help="go on from 'latest' (start anew if there is no checkpoint yet) or from a checkpoint file")
    add(
        "--init-from",
        help="checkpoint whose averaged weights a new run begins with; what they do not fit (other classes, encoders, "
        "resolution) begins fresh",
    )
    add(
        "--legacy",
        action=SWITCH,
        help="the checkpoint is (not) of the older REPA layout; found by itself",
    )
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to train; auto: CUDA if there is one")


def _grid_flags(add: Callable) -> None:
    add(
        "--sampling-steps",
        type=int,
        default=10_000,
        help="steps between two grids; 0: none, no codec needed (%(default)s)",
    )
    add("--vae", help="codec that decodes the grids; default: the one that made the latents")
    add("--grid-samples", type=int, default=36, help="images in a grid (%(default)s)")
    add("--grid-num-steps", type=int, default=50, help="SDE steps for a grid (%(default)s)")
    add(
        "--grid-cfg-scale",
        type=finite_float,
        default=1.0,
        help="guidance in a grid; 1: none (%(default)s)",
    )


def _evaluation_flags(add: Callable) -> None:
    add("--eval-steps", type=int, default=0, help="steps between two evaluations of EMA samples; 0: none (%(default)s)")
    add("--eval-ref", help="reference .npz: ADM's, or made by evaluations/reference.py")
    add("--eval-samples", type=int, default=10_000, help="samples of an evaluation (%(default)s)")
    add("--eval-num-steps", type=int, default=250, help="SDE steps of these samples (%(default)s)")
    add("--eval-batch-size", type=int, default=64, help="of these, at a time on each process (%(default)s)")
    add("--eval-inception", help="Inception weights; default: the published ones, downloaded once")


def _network_flags(add: Callable) -> None:
    add("--model", default="SiT-XL/2", help="preset, SiT-{S,B,L,XL}/{2,4,8} (%(default)s)")
    add("--depth", type=int, help="number of blocks instead of the preset's")
    add("--hidden-size", type=int, help="width instead of the preset's")
    add("--num-heads", type=int, help="attention heads instead of the preset's")
    add("--projector-dim", type=int, default=2048, help="inner width of the projectors (%(default)s)")
    add("--num-classes", type=int, help="number of classes, no fewer than the data have; default: as many")
    add(
        "--encoder-depth",
        type=int,
        help="align after this block, from 1; default 4 for S, B, 8 for L, XL",
    )
    add(
        "--fused-attn",
        action=SWITCH,
        default=True,
        help="attention through scaled_dot_product_attention (%(default)s)",
    )
    add("--qk-norm", action=SWITCH, default=False, help="LayerNorm on queries and keys (%(default)s)")
    add(
        "--cls-token",
        action=SWITCH,
        help="class slot: with it REG, without it REPA (the same as --entangle none)",
    )
    add("--ema-decay", type=finite_float, default=0.9999, help="decay of the averaged weights (%(default)s)")


def _data_flags(add: Callable) -> None:
    add("--data-dir", default="data/imagenet256", help="folder with images and latents (%(default)s)")
    add("--resolution", type=int, help="image size in px; read from the data, this only checks it")
    add("--batch-size", type=int, default=256, help="samples of an optimiser step, over all processes (%(default)s)")
    add("--num-workers", type=int, default=4, help="loader processes for each training process (%(default)s)")
    add(
        "--flip",
        action=SWITCH,
        default=False,
        help="half of the images mirrored (preprocessing/encode.py --flip) (%(default)s)",
    )
    add(
        "--check-data",
        action=SWITCH,
        default=True,
        help="look at every file for truncation before training (%(default)s)",
    )


def _precision_flags(add: Callable) -> None:
    add("--allow-tf32", action=SWITCH, default=True, help="TF32 in matrix products of CUDA (%(default)s)")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="autocast; default fp16 on CUDA, no on the CPU")


def _optimisation_flags(add: Callable) -> None:
    add("--max-train-steps", type=int, default=400_000, help="stop after so many steps (%(default)s)")
    add("--epochs", type=int, help="stop earlier, after so many passes over the data; default: do not")
    add(
        "--gradient-accumulation-steps",
        type=int,
        default=1,
        help="parts that a process cuts its samples into (%(default)s)",
    )
    add("--learning-rate", type=finite_float, default=1e-4, help="constant (%(default)s)")
    add("--adam-beta1", type=finite_float, default=0.9, help="AdamW (%(default)s)")
    add("--adam-beta2", type=finite_float, default=0.999, help="AdamW (%(default)s)")
    add("--adam-weight-decay", type=finite_float, default=0.0, help="AdamW (%(default)s)")
    add("--adam-epsilon", type=finite_float, default=1e-8, help="AdamW (%(default)s)")
    add("--max-grad-norm", type=finite_float, default=1.0, help="clip the gradient's norm to this (%(default)s)")
    add("--seed", type=int, default=0, help="of everything random (%(default)s)")


def _method_flags(add: Callable) -> None:
    add("--path-type", default="linear", choices=PATHS, help="path between data and noise (%(default)s)")
    add("--prediction", default="v", choices=["v"], help="what the network predicts: the velocity")
    add("--weighting", default="uniform", choices=WEIGHTINGS, help="distribution of training times (%(default)s)")
    add("--cfg-prob", type=finite_float, default=0.1, help="share of labels replaced by the null class (%(default)s)")
    add(
        "--enc-type",
        default="dinov2-vit-b",
        help="frozen encoders, comma-separated; the first gives the class token",
    )
    add("--enc-weights", help="local weight files of the encoders, comma-separated; default: the hub")
    add(
        "--entangle",
        choices=ENTANGLED,
        help="what the class slot holds, denoised with the latents: the first encoder's class token (the default), the "
        "mean of its patch tokens, the mean of the latents; a learnt token, not denoised; or no slot. Whatever it "
        "holds, it is aligned with the class token",
    )
    add(
        "--proj-coeff",
        type=finite_float,
        default=0.5,
        help="weight of the alignment; 0: no projectors (%(default)s)",
    )
    add("--cls", type=finite_float, default=0.03, help="weight of the class token's velocity (%(default)s)")


def _speed_flags(add: Callable) -> None:
    add(
        "--compile",
        action=SWITCH,
        default=False,
        help="compile network, loss and encoders; changes rounding only (%(default)s)",
    )
    add(
        "--activation-checkpointing",
        action=SWITCH,
        default=False,
        help="less memory, more time, the same gradients: blocks are computed again in the backward pass (%(default)s)",
    )
    add(
        "--fsdp",
        action=SWITCH,
        default=False,
        help="share weights, averages and AdamW's state out among the processes (FSDP), where one GPU cannot hold them "
        "(%(default)s)",
    )


FLAGS = {
    "run": _run_flags,
    "sample grids": _grid_flags,
    "evaluation while training": _evaluation_flags,
    "network": _network_flags,
    "data": _data_flags,
    "precision": _precision_flags,
    "speed and memory": _speed_flags,
    "optimisation": _optimisation_flags,
    "method": _method_flags,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the settings; names and meanings of the published flags are kept."""
    args = legacy_parse("Train REG, REPA or SiT.", FLAGS, argv)
    _check_args(args)
    return args


def _check_args(args: argparse.Namespace) -> None:
    """Raise InputError, naming flag, value and what is allowed, for settings that no run can have."""
    if args.model not in SiT_models:
        raise InputError(f"--model {args.model} is unknown; allowed: {', '.join(SiT_models)}")
    if not args.exp_name.strip(". "):
        raise InputError(f"--exp-name {args.exp_name!r}: must name a folder")
    _check_numbers(args)
    if args.eval_steps and not args.eval_ref:
        raise InputError(f"--eval-steps {args.eval_steps}: needs --eval-ref, the .npz to compare with")
    if args.entangle and args.cls_token is not None and args.cls_token != (args.entangle != "none"):
        given = "--cls-token" if args.cls_token else "--no-cls-token"
        raise InputError(f"--entangle {args.entangle} contradicts {given}; give one of them")
    args.entangle = args.entangle or ("none" if args.cls_token is False else "class")
    args.cls_token = args.entangle != "none"
    if args.enc_type == "none" and args.entangle in FROM_ENCODER:
        raise InputError("--enc-type none: the class slot needs an encoder; add --no-cls-token to train SiT")
    if args.resume and args.resume_step:
        raise InputError(f"--resume {args.resume} and --resume-step {args.resume_step}: give one of them")
    if args.keep_every and not args.keep_last:
        raise InputError(f"--keep-every {args.keep_every}: says what to keep besides --keep-last; give that too")
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise InputError(f"--report-to {args.report_to}: the package {args.report_to} is not installed")
    on_cuda = uses_cuda(args.device)
    args.mixed_precision = args.mixed_precision or ("fp16" if on_cuda else "no")
    if args.mixed_precision == "fp16" and not on_cuda:
        raise InputError("--mixed-precision fp16 needs a CUDA device; allowed on the CPU: no, bf16")


def _check_numbers(args: argparse.Namespace) -> None:
    for names, allowed, fits in (
        (ABOVE_0, "greater than 0", lambda value: value > 0),
        (FROM_0, "0 or greater", lambda value: value >= 0),
        (BELOW_1, "at least 0 and less than 1", lambda value: 0 <= value < 1),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not fits(value):
                raise InputError(f"{flag(name)} {value}: must be {allowed}")
    if args.seed >= 2**63:
        raise InputError(f"--seed {args.seed}: must be less than 2^63")
    if args.timeout_minutes > MINUTES_OF_A_YEAR:
        raise InputError(f"--timeout-minutes {args.timeout_minutes}: must be at most a year, {MINUTES_OF_A_YEAR}")


def check_same_run(args: argparse.Namespace, saved: dict[str, Any], source: str | Path) -> None:
    """Raise InputError, naming both values, where settings contradict those that a run was begun with."""
    for name, value in vars(args).items():
        if name in MAY_CHANGE or name not in saved or value is None or saved[name] is None:
            continue
        if value != saved[name]:
            raise InputError(
                f"{flag(name)} is {value}, but {source} was begun with {saved[name]}, and a run keeps that. Another "
                "may begin with its weights: a new --exp-name, and --init-from CHECKPOINT"
            )
