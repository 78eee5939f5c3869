"""Setting up a training run: everything is checked and built here, before any work starts."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from tqdm import tqdm

from common.io import InputError, lock_folder, read_json, write_json
from dataset import LatentDataset
from evaluations.in_training import TrainingEvaluation
from loss import FROM_ENCODER, REGLoss
from models.autoencoder import Codec, load_codec
from models.checkpoint import is_legacy, list_checkpoints, load_checkpoint, saved_settings
from models.encoders import Encoder, load_encoders
from models.interpolant import Interpolant
from models.sit import ENCODER_DEPTHS, PRESETS, SiT
from training.checkpoint_writer import CheckpointWriter
from training.config import check_same_run
from training.guards import BadSteps, sample_names
from training.metrics import RunLog, StepReports, going_on_despite
from training.parallelism import check_sharding, compile_training, count_parameters
from training.preemption import StopSignal
from training.state import build_network, prepare_networks
from training.throughput import describe_start, peak_flops, training_flops


@dataclass
class Run:
    """One training run: what `set_up` built and `train` moves on."""

    args: argparse.Namespace
    folder: Path
    accelerator: Accelerator
    data: LatentDataset
    encoders: list[Encoder]
    codec: Codec | None  # decodes samples, where they are wanted
    evaluation: TrainingEvaluation | None
    model: torch.nn.Module
    ema: SiT
    optimizer: torch.optim.Optimizer
    criterion: REGLoss
    log: RunLog
    step: int  # optimiser steps done
    reports: StepReports
    bad_steps: BadSteps
    writer: CheckpointWriter
    stop_signal: StopSignal
    wishes: set[str] = field(default_factory=set)  # what any process asked all for: "stop", "save"
    retry_save_at: int = 0  # the step from which on a failed checkpoint is tried again
    class_centres: torch.Tensor | None = None  # the mean token of each class, once an evaluation has asked for it


def set_up(args: argparse.Namespace, stop_signal: StopSignal | None = None) -> Run:
    """Return a run ready to train. Without a `stop_signal` nothing but its end stops it."""
    accelerator = make_accelerator(args)
    check_sharding(accelerator, args.fsdp)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    folder = Path(args.output_dir) / args.exp_name
    checkpoint = find_checkpoint(args, folder, accelerator)
    data = open_data(args, accelerator)
    device = accelerator.device

    tokens = (data.latent_size // int(args.model.rsplit("/")[1])) ** 2
    encoders = []
    if args.enc_type != "none" and (args.entangle in FROM_ENCODER or args.proj_coeff > 0):
        encoders = load_encoders(args.enc_type, data.resolution, args.enc_weights, tokens, device)
    codec = None
    if args.eval_steps or (args.sampling_steps and accelerator.is_main_process):
        codec = load_codec(args.vae or data.latent_format.codec, device)
    evaluation = make_evaluation(args, accelerator, encoders)
    describe_run(args, data, encoders)
    if checkpoint is not None:
        check_same_run(args, saved_settings(checkpoint), "the checkpoint's run")

    model, average, optimizer = prepare_networks(args, accelerator, checkpoint)
    step = checkpoint["steps"] if checkpoint else 0
    if accelerator.is_main_process:
        lock_folder(folder, "training")
        # A new run needs a folder it can write to; an old one goes on with a full disk.
        with going_on_despite(str(folder / "args.json")) if step else contextlib.nullcontext():
            write_json(folder / "args.json", vars(args))
    start_tracker(args, accelerator, folder)
    log = RunLog(
        folder,
        args.batch_size,
        accelerator.is_main_process,
        lambda row, at: accelerator.log(row, step=at),
        checkpoint.get("log") if checkpoint else None,
        step,
        peak_images_per_second(args, accelerator),
    )
    start = describe_start(args.seed, step, device, accelerator.num_processes)
    log.write_line("starts.jsonl", start | count_parameters(model))
    writer = CheckpointWriter(folder / "checkpoints", args.keep_last, args.keep_every, args.background_save, tqdm.write)
    if accelerator.is_main_process:
        writer.clear_leftovers()
    criterion = REGLoss(Interpolant(args.path_type), args.proj_coeff, args.cls, args.weighting)
    if args.compile:
        compile_training(accelerator.unwrap_model(model), encoders, criterion)
    reports = StepReports(lambda values: accelerator.reduce(values, "mean"), device, ("stop", "save"))
    bad_steps = BadSteps(
        log, accelerator.gather, lambda at: sample_names(args, data, at), args.max_bad_steps, args.mixed_precision
    )
    return Run(
        args, folder, accelerator, data, encoders, codec, evaluation, model, average, optimizer, criterion, log, step,
        reports, bad_steps, writer, stop_signal or StopSignal(),
    )  # fmt: skip


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Return accelerate's view of the processes and of the precision."""
    return Accelerator(
        cpu=args.device == "cpu",
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=str(Path(args.output_dir) / args.exp_name / args.logging_dir),
        kwargs_handlers=[
            # Each step has the same graph; with accumulation, parts that do not reduce gradients take turns with one.
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True, static_graph=args.gradient_accumulation_steps == 1
            ),
            InitProcessGroupKwargs(timeout=timedelta(minutes=args.timeout_minutes)),
        ],
    )


def find_checkpoint(args: argparse.Namespace, folder: Path, accelerator: Accelerator) -> dict[str, Any] | None:
    """Return the checkpoint to go on from, or None for a new run. A folder that holds a run is never begun again."""
    checkpoints = folder / "checkpoints"
    if args.resume == "latest":
        path = agree(accelerator, newest_good(checkpoints) if accelerator.is_main_process else None)
        if path is None:
            if (folder / "args.json").exists():
                check_same_run(args, read_json(folder / "args.json"), folder / "args.json")
            return None
        return load_run(path, verify=False)
    elif args.resume or args.resume_step:
        path = Path(args.resume) if args.resume else checkpoints / f"{args.resume_step:07d}.pt"
        checkpoint = load_run(path, verify=accelerator.is_main_process)
        if args.legacy is not None and args.legacy != is_legacy(checkpoint):
            raise InputError(f"--legacy {args.legacy}, but {path} has legacy layout {is_legacy(checkpoint)}")
        return checkpoint
    elif (folder / "args.json").exists() or list_checkpoints(checkpoints):
        raise InputError(
            f"{folder} holds a run already; go on with it by --resume latest, or choose another --exp-name"
        )
    return None


def newest_good(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint of a folder that is whole, warning of newer ones that are not; None if it has none.

    Raises:
        InputError: there are checkpoints, but none is whole.
    """
    found = list_checkpoints(checkpoints)
    for path in reversed(found):
        try:
            load_run(path)
            return path
        except InputError as error:
            print(f"warning: not going on from {path.name}, trying the one before it: {error}", file=sys.stderr)
    if found:
        raise InputError(f"{checkpoints}: none of its {len(found)} checkpoints is whole; remove them to start anew")
    return None


def load_run(path: Path, verify: bool = True) -> dict[str, Any]:
    """Return a checkpoint that a run can go on from."""
    checkpoint = load_checkpoint(path, verify)
    if missing := {"model", "ema", "opt", "args", "steps"} - checkpoint.keys():
        raise InputError(f"{path}: to go on from it, it lacks {', '.join(sorted(missing))}")
    return checkpoint


def agree(accelerator: Accelerator, value: Any) -> Any:
    """Return the main process's value on every process."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def open_data(args: argparse.Namespace, accelerator: Accelerator) -> LatentDataset:
    """Return the training data, checked against the flags and, shared among the processes, file by file."""
    data = LatentDataset(args.data_dir, args.flip)
    if args.num_classes is not None and args.num_classes < data.num_classes:
        raise InputError(f"--num-classes {args.num_classes}: the data in {args.data_dir} have {data.num_classes}")
    if args.resolution is not None and args.resolution != data.resolution:
        raise InputError(f"--resolution {args.resolution}: the data in {args.data_dir} have {data.resolution}")
    if args.check_data:
        part, parts = accelerator.process_index, accelerator.num_processes
        with tqdm(total=len(data) // parts, desc="checking the data", unit="image", disable=part > 0) as bar:
            data.check(bar.update, part, parts)
    return data


def make_evaluation(
    args: argparse.Namespace, accelerator: Accelerator, encoders: list[Encoder]
) -> TrainingEvaluation | None:
    """Return what scores the run's samples, or None where that is not wanted."""
    if not args.eval_steps:
        return None
    weights = args.enc_weights.split(",")[0] if args.enc_weights else None
    return TrainingEvaluation(
        accelerator,
        args.eval_ref,
        args.eval_samples,
        args.eval_batch_size,
        args.eval_inception,
        encoders[0] if encoders else None,
        weights or None,
    )


def describe_run(args: argparse.Namespace, data: LatentDataset, encoders: list[Encoder]) -> None:
    """Complete the settings by what data and encoders tell, so that a checkpoint describes its network fully."""
    size = args.model.removeprefix("SiT-").split("/")[0]
    depth, hidden_size, num_heads = PRESETS[size]
    args.depth, args.hidden_size = args.depth or depth, args.hidden_size or hidden_size
    args.num_heads = args.num_heads or num_heads
    args.encoder_depth = args.encoder_depth or ENCODER_DEPTHS[size]
    args.num_classes, args.resolution = args.num_classes or data.num_classes, data.resolution
    args.in_channels, args.latent_size = data.latent_format.channels, data.latent_size
    args.codec = data.latent_format.to_json()
    args.z_dims = [encoder.width for encoder in encoders] if args.proj_coeff > 0 else []
    args.cls_token_dim = None  # so it stays for a learnt token: it has no clean one to be denoised towards
    if args.entangle in FROM_ENCODER:
        args.cls_token_dim = encoders[0].width
    elif args.entangle == "latent-mean":
        args.cls_token_dim = args.in_channels


def peak_images_per_second(args: argparse.Namespace, accelerator: Accelerator) -> float | None:
    """Return how many images the network's arithmetic alone would allow; None on the CPU and on GPUs not known."""
    if accelerator.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(accelerator.device), args.mixed_precision, args.allow_tf32)
    if peak is None:
        return None
    with torch.device("meta"):
        network = build_network(args)
    return peak * accelerator.num_processes / training_flops(network)


def start_tracker(args: argparse.Namespace, accelerator: Accelerator, folder: Path) -> None:
    """Start wandb or tensorboard; a resumed run goes on in the same wandb run."""
    if args.report_to == "none":
        return
    settings = {
        name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in vars(args).items()
    }
    run_id = f"{args.exp_name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"
    (folder / args.logging_dir).mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers(
        "REG",
        config=settings,
        init_kwargs={"wandb": {"name": args.exp_name, "id": run_id, "resume": "allow", "dir": str(folder)}},
    )
