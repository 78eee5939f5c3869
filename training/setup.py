"""Setting up a training run: everything is checked and built here, before any work starts."""

from __future__ import annotations

import contextlib
import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from PIL.Image import Image

from common.distributed import broadcast_from_main
from common.io import InputError, lock_folder, progress_bar, read_json, write_json
from dataset import GlobalBatchSampler, LatentDataset
from evaluations.in_training import TrainingEvaluation
from loss import FROM_ENCODER, REGLoss
from models.autoencoder import Codec, load_decoder
from models.checkpoint import is_legacy, list_checkpoints, saved_settings
from models.encoders import Encoder, load_encoders
from models.interpolant import Interpolant
from models.sit import SiT
from training.checkpoint_writer import CheckpointWriter
from training.config import RunFacts, TrainConfig, check_same_run, find_facts, saved_args
from training.guards import BadSteps, GuardedOptimizer
from training.messages import logger, start_messages
from training.metrics import RunLog, StepReports, warn_if_unwritable
from training.parallelism import check_sharding, compile_training, count_parameters
from training.preemption import StopSignal
from training.randomness import StepRandomness
from training.state import Run, load_resumable, newest_complete, prepare_networks
from training.throughput import describe_start, peak_flops, training_flops

REQUESTS = ("stop", "save")  # what a process can ask all processes for


def set_up(config: TrainConfig, stop_signal: StopSignal | None = None) -> Run:
    """Return a run that is ready to train. Without a `stop_signal` only its end stops it."""
    # Processes and precision.
    accelerator = make_accelerator(config)
    start_messages(accelerator.is_main_process)
    check_sharding(accelerator, config.fsdp)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32

    # Everything that can be wrong with the input.
    checkpoint = find_checkpoint(config, accelerator)
    data = open_data(config, accelerator)
    encoders = make_encoders(config, data, accelerator)
    codec = make_codec(config, data, accelerator)
    evaluation = make_evaluation(config, accelerator, encoders)
    widths = [encoder.width for encoder in encoders]
    facts = find_facts(config, data.resolution, data.latent_size, data.num_classes, data.latent_format, widths)
    if checkpoint is not None:
        check_same_run(saved_args(config, facts), saved_settings(checkpoint), "the checkpoint's run")

    # Network, optimizer, loss.
    model, average, optimizer = prepare_networks(config, facts, accelerator, checkpoint)
    optimizer = GuardedOptimizer(optimizer, logger.info)
    path = Interpolant(config.path_type)
    criterion = REGLoss(path, config.loss_weights)
    if config.compile:
        compile_training(accelerator.unwrap_model(model), encoders, criterion)
    randomness = make_randomness(config, facts, path, accelerator)

    # The run's folder, its log and its guards.
    step = checkpoint["steps"] if checkpoint else 0
    claim_folder(config, facts, accelerator, step)
    start_tracker(config, facts, accelerator)
    log = make_log(config, facts, accelerator, checkpoint, model)
    writer = make_writer(config, accelerator)
    reports = StepReports(lambda values: accelerator.reduce(values, "mean"), accelerator.device, REQUESTS)
    bad_steps = BadSteps(
        log, accelerator.gather, lambda at: sample_names(config, data, at), config.max_bad_steps, config.precision
    )
    return Run(
        config, facts, accelerator, data, encoders, codec, evaluation, model, average, optimizer, criterion, randomness,
        log, step, reports, bad_steps, writer, stop_signal or StopSignal(),
    )  # fmt: skip


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return accelerate's object for processes, precision and trackers."""
    return Accelerator(
        cpu=config.device == "cpu",
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=str(config.folder / config.logging_dir),
        kwargs_handlers=[
            # Without accumulation every step has the same graph; with it, some micro-batches do not reduce gradients.
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True, static_graph=config.gradient_accumulation_steps == 1
            ),
            InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes)),
        ],
    )


def find_checkpoint(config: TrainConfig, accelerator: Accelerator) -> dict[str, Any] | None:
    """Return the checkpoint to resume from, or None for a new run. A folder that holds a run is never overwritten."""
    folder, checkpoints = config.folder, config.folder / "checkpoints"
    if config.resume == "latest":
        path = broadcast_from_main(accelerator, lambda: newest_complete(checkpoints))
        if path is not None:
            return load_resumable(path, verify=False)
        if (folder / "args.json").exists():
            check_same_run(vars(config), read_json(folder / "args.json"), folder / "args.json")
        return None
    if config.resume or config.resume_step:
        path = Path(config.resume) if config.resume else checkpoints / f"{config.resume_step:07d}.pt"
        checkpoint = load_resumable(path, verify=accelerator.is_main_process)
        if config.legacy is not None and config.legacy != is_legacy(checkpoint):
            raise InputError(f"--legacy {config.legacy}, but {path} has legacy layout {is_legacy(checkpoint)}")
        return checkpoint
    if (folder / "args.json").exists() or list_checkpoints(checkpoints):
        raise InputError(f"{folder} already holds a run; resume it with --resume latest, or choose another --exp-name")
    return None


def open_data(config: TrainConfig, accelerator: Accelerator) -> LatentDataset:
    """Return the training data, checked against the flags and, with the work shared by the processes, file by file."""
    data = LatentDataset(config.data_dir, config.flip)
    if config.num_classes is not None and config.num_classes < data.num_classes:
        raise InputError(f"--num-classes {config.num_classes}: the data in {config.data_dir} have {data.num_classes}")
    if config.resolution is not None and config.resolution != data.resolution:
        raise InputError(f"--resolution {config.resolution}: the data in {config.data_dir} have {data.resolution}")
    if config.check_data:
        part, parts = accelerator.process_index, accelerator.num_processes
        with progress_bar(total=len(data) // parts, desc="checking the data", unit="image", main=part == 0) as bar:
            data.check(bar.update, part, parts)
    return data


def make_encoders(config: TrainConfig, data: LatentDataset, accelerator: Accelerator) -> list[Encoder]:
    """Return the frozen encoders, empty if neither class slot nor alignment needs one."""
    if config.enc_type == "none" or not (config.slot in FROM_ENCODER or config.proj_coeff > 0):
        return []
    tokens = (data.latent_size // int(config.model.rsplit("/")[1])) ** 2
    return load_encoders(config.enc_type, data.resolution, config.enc_weights, tokens, accelerator.device)


def make_codec(config: TrainConfig, data: LatentDataset, accelerator: Accelerator) -> Codec | None:
    """Return the codec that decodes samples, on the processes that need it."""
    if config.eval_steps or (config.sampling_steps and accelerator.is_main_process):
        return load_decoder(data.latent_format, config.vae, accelerator.device)
    return None


def make_evaluation(
    config: TrainConfig, accelerator: Accelerator, encoders: list[Encoder]
) -> TrainingEvaluation | None:
    """Return the evaluation of samples, or None without --eval-steps."""
    if not config.eval_steps:
        return None
    weights = config.enc_weights.split(",")[0] if config.enc_weights else None
    return TrainingEvaluation(
        accelerator,
        config.eval_ref,
        config.eval_samples,
        config.eval_batch_size,
        config.eval_inception,
        encoders[0] if encoders else None,
        weights or None,
    )


def make_randomness(
    config: TrainConfig, facts: RunFacts, path: Interpolant, accelerator: Accelerator
) -> StepRandomness:
    """Return the source of everything random in a step."""
    network = facts.network
    return StepRandomness(
        seed=config.seed,
        batch_size=config.batch_size,
        latent_shape=(network.in_channels, network.input_size, network.input_size),
        cls_token_dim=network.cls_token_dim,
        path=path,
        weighting=config.weighting,
        cfg_prob=config.cfg_prob,
        device=accelerator.device,
    )


def claim_folder(config: TrainConfig, facts: RunFacts, accelerator: Accelerator, step: int) -> None:
    """Lock the run's folder for this run and write args.json."""
    if accelerator.is_main_process:
        lock_folder(config.folder, "training")
        # A new run needs a writable folder; a resumed run continues on a full disk.
        with warn_if_unwritable(str(config.folder / "args.json")) if step else contextlib.nullcontext():
            write_json(config.folder / "args.json", saved_args(config, facts))


def make_log(
    config: TrainConfig,
    facts: RunFacts,
    accelerator: Accelerator,
    checkpoint: dict[str, Any] | None,
    model: torch.nn.Module,
) -> RunLog:
    """Return the run's log, with this start noted in starts.jsonl."""
    step = checkpoint["steps"] if checkpoint else 0
    log = RunLog(
        config.folder,
        config.batch_size,
        accelerator.is_main_process,
        lambda row, at: accelerator.log(row, step=at),
        lambda picture, at: track_picture(accelerator, picture, at),
        checkpoint.get("log") if checkpoint else None,
        step,
        peak_images_per_second(config, facts, accelerator),
    )
    start = describe_start(config.seed, step, accelerator.device, accelerator.num_processes)
    log.write_line("starts.jsonl", start | count_parameters(model))
    return log


def make_writer(config: TrainConfig, accelerator: Accelerator) -> CheckpointWriter:
    """Return the writer of checkpoints; files that a killed process left incomplete are removed."""
    writer = CheckpointWriter(
        config.folder / "checkpoints",
        config.keep_last,
        config.keep_every,
        config.background_save,
        config.checkpointing_minutes,
    )
    if accelerator.is_main_process:
        writer.clear_leftovers()
    return writer


def sample_names(config: TrainConfig, data: LatentDataset, step: int) -> list[str]:
    """Return the latent files of a step's global batch, in its order."""
    sampler = GlobalBatchSampler(len(data), config.batch_size, config.seed, range(step, step + 1), flip=config.flip)
    return [data.latent_path(i) for indices in sampler for i in indices]


def peak_images_per_second(config: TrainConfig, facts: RunFacts, accelerator: Accelerator) -> float | None:
    """Return the throughput at the devices' peak FLOP/s; None on the CPU and on GPUs that are not in the table."""
    if accelerator.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(accelerator.device), config.precision, config.allow_tf32)
    if peak is None:
        return None
    with torch.device("meta"):
        network = SiT(facts.network)
    return peak * accelerator.num_processes / training_flops(network)


def start_tracker(config: TrainConfig, facts: RunFacts, accelerator: Accelerator) -> None:
    """Start wandb or tensorboard; a resumed run continues the same wandb run."""
    if config.report_to == "none":
        return
    settings = {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for name, value in saved_args(config, facts).items()
    }
    run_id = f"{config.exp_name}-{hashlib.sha256(str(config.folder.resolve()).encode()).hexdigest()[:8]}"
    (config.folder / config.logging_dir).mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers(
        "REG",
        config=settings,
        init_kwargs={"wandb": {"name": config.exp_name, "id": run_id, "resume": "allow", "dir": str(config.folder)}},
    )


def track_picture(accelerator: Accelerator, picture: Image, step: int) -> None:
    """Pass a picture of samples to the tracker."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            tracker.log({"samples": wandb.Image(picture)}, step=step)
        elif tracker.name == "tensorboard":
            tracker.writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")
