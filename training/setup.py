"""Setting up a training run: everything is checked and built here, before any work starts."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object

from common.cli import changed
from common.distributed import broadcast_from_main, start_processes
from common.errors import InputError
from common.io import check_writable, write_json
from common.loader import check_shared_memory
from common.locks import lock_folder
from common.progress import progress_bar
from dataset import GlobalBatchSampler, LatentDataset
from evaluations.in_training import TrainingEvaluation
from loss import REGLoss
from models.autoencoder import Codec, load_decoder
from models.cached_tokens import CachedTokens, open_tokens
from models.checkpoint import saved_settings
from models.encoders import Encoder
from models.inference import NETWORK_DTYPES
from models.sit import SiT
from training.checkpoint_writer import CheckpointWriter
from training.config import RunFacts, TrainConfig, find_facts
from training.encoders import find_digests, make_encoders, name_encoders
from training.guards import BadSteps, FiniteWeights, GuardedOptimizer
from training.limits import check_memory, choose_micro_batches, free_memory, memory_of, step_memory
from training.messages import logger, start_messages, warn_if_unwritable
from training.metrics import RunLog, StepReports
from training.parallelism import check_sharding, compile_training, count_parameters
from training.preemption import StopSignal
from training.randomness import StepRandomness
from training.record import (
    check_same_inputs,
    check_same_network,
    check_same_run,
    run_record,
    saved_args,
)
from training.restore import check_log, restoring
from training.resume import ResumePoint, check_unchanged, find_resume_point, load_chosen
from training.rewind import finish_order, go_back
from training.schedule import choose_rates, kept_settings
from training.state import Run, alignment_ended, prepare_networks
from training.throughput import describe_start, peak_flops, training_flops
from training.tracker import installed_tracker, start_tracker

PREFETCHED = 4  # batches of each loader process
REQUESTS = ("stop", "save", "lost")  # what a process can ask all processes for; lost: a loader process has ended


def set_up(config: TrainConfig, stop_signal: StopSignal | None = None) -> Run:
    """Return a run that is ready to train. Without a `stop_signal` only its end stops it.

    The run's folder is claimed last. With --dry-run nothing is written.
    """
    # Processes and precision.
    accelerator = make_accelerator(config)
    start_messages(accelerator.is_main_process)
    check_sharding(accelerator, config.fsdp)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32

    # Everything that can be wrong with the input.
    tokens = open_tokens(config.data_dir, config.cached_tokens)
    config = name_encoders(config, tokens)
    point = broadcast_from_main(accelerator, lambda: find_resume_point(config))
    checkpoint = load_chosen(config, point)
    with restoring(point.path):
        config = choose_rates(config, checkpoint, point.path)
    say_differences(config)
    data = open_data(config, accelerator, tokens)
    encoders = make_encoders(config, data, accelerator)
    digests = broadcast_from_main(accelerator, lambda: find_digests(data, encoders))  # of the weights as they are given
    encoders = [encoder.convert(NETWORK_DTYPES[config.encoder_dtype]) for encoder in encoders]
    codec = make_codec(config, data, accelerator)
    if config.sampling_steps and broadcast_from_main(accelerator, lambda: codec is None):
        config = changed(config, sampling_steps=0)
    evaluation = make_evaluation(config, accelerator, encoders)
    widths = [one.format.width for one in data.tokens] or [encoder.width for encoder in encoders]
    facts = find_facts(config, data.resolution, data.latent_size, data.num_classes, data.latent_format, widths, digests)
    with restoring(point.path):
        inputs_changed = check_restorable(config, facts, data, checkpoint, point.path)
    memory = memory_of(accelerator.device)
    check_memory(facts.network, config.batch_size, accelerator.num_processes, config.fsdp, memory)
    before = saved_settings(checkpoint, point.path).get("gradient_accumulation_steps") if checkpoint else None
    facts = divide_batch(config, facts, accelerator, encoders, before)
    check_loader(config, facts, data, accelerator)

    # Network, optimizer, loss.
    with restoring(point.path):
        model, average, optimizer = prepare_networks(config, facts, accelerator, checkpoint, point.path)
    optimizer = GuardedOptimizer(optimizer, logger.info)
    criterion = REGLoss(facts.path, config.loss_weights)
    if config.compile:
        compile_training(accelerator.unwrap_model(model), encoders, criterion)
    randomness = make_randomness(config, facts, accelerator)

    # The run's folder, its log and its guards.
    step = checkpoint["steps"] if checkpoint else 0
    set_aside = claim_folder(config, facts, accelerator, point, step)
    start_tracker(config, facts, accelerator)
    log = make_log(config, facts, accelerator, checkpoint)
    note_start(config, facts, accelerator, log, model, step, {"asked": point.asked, **set_aside, **inputs_changed})
    writer = make_writer(config, accelerator)
    reduce = partial(accelerator.reduce, reduction="mean")
    weights = FiniteWeights(model, average, optimizer, reduce, writer.folder, step)
    reports = StepReports(reduce, accelerator.device, REQUESTS)
    bad_steps = BadSteps(
        log, accelerator.gather, lambda at: sample_names(config, data, at), config.max_bad_steps, config.precision
    )
    return Run(
        config, facts, accelerator, data, encoders, codec, evaluation, model, average, optimizer, criterion, randomness,
        log, step, reports, bad_steps, weights, writer, stop_signal or StopSignal(), resumed_from=point.path,
    )  # fmt: skip


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return accelerate's object for processes, precision and trackers."""
    return start_processes(
        config.device,
        config.precision,
        config.gradient_accumulation_steps or 1,  # `divide_batch` may choose more
        log_with=installed_tracker(config),
        project_dir=str(config.folder / config.logging_dir),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # `divide_batch` sets more
            InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes)),
        ],
    )


def say_differences(config: TrainConfig) -> None:
    """Say where the given flags mean something else than in the published program (docs/published-flags.md)."""
    total, parts = config.batch_size, config.gradient_accumulation_steps
    if parts is not None and parts > 1:
        logger.info(
            f"note: a step takes {total} images in total, {parts} micro-batches on each process; the published program "
            f"would take {total} x {parts} = {total * parts} with these flags"
        )
    if config.ops_head is not None:
        logger.info(f"note: --ops-head {config.ops_head} is accepted and ignored, as in the published program")


def open_data(config: TrainConfig, accelerator: Accelerator, tokens: Sequence[CachedTokens]) -> LatentDataset:
    """Return the training data, checked against the flags and, with the work shared by the processes, file by file."""
    data = LatentDataset(config.data_dir, config.flip, config.latents_folder, config.latents_codec, tokens)
    if config.num_classes is not None and config.num_classes < data.num_classes:
        raise InputError(f"--num-classes {config.num_classes}: the data in {config.data_dir} have {data.num_classes}")
    if config.resolution is not None and config.resolution != data.resolution:
        raise InputError(f"--resolution {config.resolution}: the data in {config.data_dir} have {data.resolution}")
    if config.max_images is not None:
        data.keep(config.max_images)
    processes, parts = accelerator.num_processes, config.gradient_accumulation_steps or 1
    GlobalBatchSampler(len(data), config.batch_size, config.seed, range(0), 0, processes, parts)  # checks divisibility
    config.check_pairs(config.batch_size, processes, parts)
    if config.check_data:
        part, parts = accelerator.process_index, accelerator.num_processes
        with progress_bar(total=len(data) // parts, desc="checking the data", unit="image", main=part == 0) as bar:
            data.check(bar.update, part, parts)
    return data


def make_codec(config: TrainConfig, data: LatentDataset, accelerator: Accelerator) -> Codec | None:
    """Return the codec that decodes samples, on the processes that need it.

    If no flag asks for grids or a codec, a codec that cannot be loaded is a warning, and None is returned.
    """
    if not (config.eval_steps or (config.sampling_steps and accelerator.is_main_process)):
        return None
    try:
        return load_decoder(data.latent_format, config.vae, accelerator.device)
    except InputError as error:
        if config.eval_steps or config.given & {"sampling_steps", "vae"}:
            raise
        logger.warning("there will be no sample grids, because the codec cannot be loaded: %s", error)
        return None


def make_evaluation(
    config: TrainConfig, accelerator: Accelerator, encoders: list[Encoder]
) -> TrainingEvaluation | None:
    """Return the evaluation of samples, or None without --eval-steps."""
    if not config.eval_steps:
        return None
    weights = config.enc_weights.split(",")[0] if config.enc_weights else None
    encoder = encoders[0] if encoders else None
    return TrainingEvaluation(
        accelerator, config.eval_ref, config.eval_samples, config.eval_batch_size, config.eval_inception, encoder,
        weights or None,
    )  # fmt: skip


def divide_batch(
    config: TrainConfig, facts: RunFacts, accelerator: Accelerator, encoders: list[Encoder], before: Any
) -> RunFacts:
    """Return the facts with the number of micro-batches, the same on all processes; see `choose_micro_batches`.

    `before`: that of the checkpoint from which the run resumes. On a GPU, and in a dry run, the facts get the estimated
    memory of a step as well.
    """
    device, parts = accelerator.device, config.gradient_accumulation_steps or 1
    free = free_memory(device)
    if free is not None or config.dry_run:
        weights = (tensor.nbytes for encoder in encoders for tensor in (*encoder.parameters(), *encoder.buffers()))
        loaded = torch.cuda.memory_allocated(device) if device.type == "cuda" else sum(weights)
        frees, loads = zip(*gather_object([(free, loaded)]), strict=True)
        memory = step_memory(
            facts.network, config.precision, config.compile, config.fused_attn, device.type, config.loss_weights,
            samples=config.batch_size // accelerator.num_processes, processes=accelerator.num_processes,
            loaded=max(loads), sharded=config.fsdp, checkpointing=config.activation_checkpointing,
            multiple=2 if config.cfm_coeff else 1,
        )  # fmt: skip
        if free is not None:
            parts = choose_micro_batches(memory, config.gradient_accumulation_steps, before, min(frees))
        facts = replace(facts, memory=memory.estimate(parts))
    accelerator.gradient_accumulation_steps = parts
    # Without accumulation every step has the same graph; with it, some micro-batches do not reduce gradients.
    accelerator.ddp_handler.static_graph = parts == 1
    return replace(facts, micro_batches=parts)


def check_loader(config: TrainConfig, facts: RunFacts, data: LatentDataset, accelerator: Accelerator) -> None:
    """Raise InputError if the shared memory has no room for the batches of the loader processes."""
    micro_batch = config.batch_size // accelerator.num_processes // facts.micro_batches
    check_shared_memory("--num-workers", config.num_workers, PREFETCHED, micro_batch * data.item_bytes)


def make_randomness(config: TrainConfig, facts: RunFacts, accelerator: Accelerator) -> StepRandomness:
    """Return the source of everything random in a step."""
    network = facts.network
    return StepRandomness(
        seed=config.seed,
        batch_size=config.batch_size,
        latent_shape=(network.in_channels, network.input_size, network.input_size),
        cls_token_dim=network.cls_token_dim,
        path=facts.path,
        weighting=config.weighting,
        cfg_prob=config.cfg_prob,
        sprint_tokens=network.tokens if network.sprint else 0,
        sprint_path_drop=network.sprint_path_drop,
        time_parameters=config.time_parameters,
        device=accelerator.device,
    )


def check_restorable(
    config: TrainConfig, facts: RunFacts, data: LatentDataset, checkpoint: dict[str, Any] | None, path: Path | None
) -> dict[str, Any]:
    """Check a checkpoint against the settings, the network and the data; return what starts.jsonl records of it.

    Raises InputError, naming both values, for the first contradiction.
    """
    if checkpoint is None:
        return {}
    saved = saved_settings(checkpoint, path)
    check_same_run(saved_args(config, facts), saved, path)
    changed = check_same_inputs(config, facts, saved)
    check_same_network(checkpoint, facts, None if config.allow_changed_data else data.classes, path)
    check_log(checkpoint.get("log"))
    return {"changed": changed} if changed else {}


def claim_folder(
    config: TrainConfig, facts: RunFacts, accelerator: Accelerator, point: ResumePoint, step: int
) -> dict[str, Any]:
    """Lock the run's folder for this run, set aside what is later than its step if it goes back, and write args.json.

    A dry run only checks that it could. Return what starts.jsonl records of it.
    """
    args = config.folder / "args.json"

    def claim() -> dict[str, Any]:
        if step == 0:
            check_writable(args, f"--output-dir {config.output_dir}:")
        if config.dry_run:
            return {}
        lock_folder(config.folder, "training")
        check_unchanged(config.folder, point.seen)
        order = finish_order(config.folder)
        order = (go_back(config.folder, step) if point.goes_back else None) or order
        if order is not None:
            place = config.folder / order.place
            logger.info("what the run had after step %d is now in %s; nothing was deleted", order.step, place)
        # A new run needs a writable folder; a resumed run continues on a full disk.
        with warn_if_unwritable(str(args)) if step else contextlib.nullcontext():
            write_json(args, run_record(config, facts))
        return {} if order is None else {"set_aside": order.place}

    return broadcast_from_main(accelerator, claim)


def make_log(
    config: TrainConfig,
    facts: RunFacts,
    accelerator: Accelerator,
    checkpoint: dict[str, Any] | None,
) -> RunLog:
    """Return the run's log."""
    step = checkpoint["steps"] if checkpoint else 0
    return RunLog(
        config.folder,
        config.batch_size,
        accelerator.is_main_process and not config.dry_run,
        lambda row, at: accelerator.log(row, step=at),
        lambda picture, at: [tracker.show(picture, at) for tracker in accelerator.trackers],
        checkpoint.get("log") if checkpoint else None,
        step,
        peak_images_per_second(config, facts, accelerator, step),
    )


def note_start(
    config: TrainConfig, facts: RunFacts, accelerator: Accelerator, log: RunLog, model: torch.nn.Module, step: int,
    more: dict[str, Any],
) -> None:  # fmt: skip
    """Append this start to starts.jsonl."""
    start = describe_start(config.seed, step, accelerator.device, accelerator.num_processes)
    start |= count_parameters(model) | kept_settings(config) | {"micro_batches": facts.micro_batches}
    start |= {"estimated_memory": facts.memory.total} if facts.memory else {}
    log.write_line("starts.jsonl", start | {name: value for name, value in more.items() if value is not None})


def make_writer(config: TrainConfig, accelerator: Accelerator) -> CheckpointWriter:
    """Return the writer of checkpoints; files that a killed process left incomplete are removed."""
    writer = CheckpointWriter(
        config.folder / "checkpoints",
        config.keep_last,
        config.keep_every,
        config.background_save,
        config.checkpointing_minutes,
    )
    if accelerator.is_main_process and not config.dry_run:
        writer.clear_leftovers()
    return writer


def sample_names(config: TrainConfig, data: LatentDataset, step: int) -> list[str]:
    """Return the latent files of a step's global batch, in its order."""
    sampler = GlobalBatchSampler(len(data), config.batch_size, config.seed, range(step, step + 1), flip=config.flip)
    return [data.latent_path(i) for indices in sampler for i in indices]


def peak_images_per_second(config: TrainConfig, facts: RunFacts, accelerator: Accelerator, step: int) -> float | None:
    """Return the throughput at the devices' peak FLOP/s after a step; None on the CPU and for GPUs not in the table."""
    if accelerator.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(accelerator.device), config.precision, config.allow_tf32)
    if peak is None:
        return None
    with torch.device("meta"):
        network = SiT(facts.network)
    return peak * accelerator.num_processes / training_flops(network, project=not alignment_ended(config, step))


def peak_memory(device: torch.device) -> str:
    """Return the largest amount of memory that this process has used so far, on its GPU or of the machine."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB of GPU memory"
    units = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units / 1e9:.1f} GB"
