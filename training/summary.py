"""What a run says about itself: its settings at the start, a line for each row of numbers, its files at the end."""

from __future__ import annotations

import math
import shlex
from datetime import timedelta
from typing import Any

import torch

from loss import TERMS
from training.config import TrainConfig
from training.limits import in_gb
from training.schedule import varies
from training.state import Run

SHOWN = ("loss", *(term.name for term in TERMS))  # in the lines and in the progress bar
NOTABLE_WAIT = 0.1  # share of the time waiting for data, from which it is shown
NOTABLE_INITIAL = 0.1  # share of the initial weights in the averaged ones at the last step, from which there is a note
SCORES = {"fid": "FID", "sfid": "sFID", "encoder_fd": "encoder FD", "coherence": "coherence"}


def starting(run: Run, last_step: int) -> list[str]:
    """Return the lines that describe a run at its start, one for each subject, and notes."""
    config, notes = run.config, run.evaluation.notes if run.evaluation else ()
    subjects = {
        "run": f"{run.folder}, {resume_point(run)}; last step {last_step}",
        "device": device(run),
        "batch": batch(run),
        **memory(run),
        "network": network(run),
        "encoder": encoders(run),
        "data": data(run),
        "loss": loss(run),
        "steps": f"{learning_rate(config)}, EMA decay {config.ema_decay:g}, seed {config.seed}",
        "files": files(run),
    }
    width = max(map(len, subjects))
    lines = [f"{subject:{width}}  {text}" for subject, text in subjects.items()]
    return lines + averages(run, last_step) + [f"note: evaluation while training: {note}" for note in notes]


def learning_rate(config: TrainConfig) -> str:
    """Return the learning rates and, if it is on, their schedule."""
    parts = [f"learning rate {config.learning_rate:g}"]
    if config.optimizer == "muon":
        parts.append(f"of Muon {config.muon_learning_rate:g}")
    if varies(config):
        parts.append(f"{config.lr_schedule} after {config.warmup_steps} warm-up steps")
    return ", ".join(parts)


def averages(run: Run, last_step: int) -> list[str]:
    """Return a note if a new run is so short for its EMA decay that samples show the initial weights."""
    config = run.config
    initial = config.ema_decay**last_step
    if run.step or config.init_from or initial < NOTABLE_INITIAL:
        return []
    shorter = 1 - float(f"{5 / max(last_step, 10):.1g}")  # at the last step, about 1 % is initial
    return [
        f"note: at step {last_step}, {initial:.0%} of the averaged weights will still be the initial ones, because "
        f"--ema-decay is {config.ema_decay:g}; grids, scores and generate.py use the averaged weights, so for a run of "
        f"this length use about {shorter:g}"
    ]


def resume_point(run: Run) -> str:
    """Return where a run starts: new, with weights of another one, or from a step of a checkpoint."""
    config = run.config
    if not run.step:
        return f"new, with weights of {config.init_from}" if config.init_from else "new"
    return f"resumed from step {run.step} of {run.resumed_from}"


def device(run: Run) -> str:
    """Return devices and precision."""
    config, count, where = run.config, run.accelerator.num_processes, run.accelerator.device
    tf32 = " (matrix products in TF32)" if where.type == "cuda" and config.allow_tf32 else ""
    precision = {"no": f"float32{tf32}"}.get(config.precision, f"{config.precision} autocast")
    threads = torch.get_num_threads()
    cpu = f"CPU ({threads} {'thread' if threads == 1 else 'threads'})"
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else cpu
    switches = [name for name in ("compile", "activation_checkpointing", "fsdp") if getattr(config, name)]
    return ", ".join([f"{count} x {name}" if count > 1 else name, precision, *switches]).replace("_", " ")


def batch(run: Run) -> str:
    """Return how the samples of a step are divided."""
    processes, parts = run.accelerator.num_processes, run.facts.micro_batches
    size = run.config.batch_size
    noun = "process" if processes == 1 else "processes"
    accumulation = f" x {parts} accumulation steps" if parts > 1 else ""
    chosen = ", chosen to fit the memory" if parts > 1 and run.config.gradient_accumulation_steps is None else ""
    return f"{processes} {noun} x {size // processes // parts} samples{accumulation} = {size} samples per step{chosen}"


def memory(run: Run) -> dict[str, str]:
    """Return the estimated memory of a process, or nothing if it was not estimated."""
    found = run.facts.memory
    if found is None:
        return {}
    parts = {"weights, gradients, averages, optimizer": found.state, "encoders, codec": found.loaded}
    parts["activations"] = found.activations
    listed = ", ".join(f"{name} {in_gb(count)}" for name, count in parts.items())
    return {"memory": f"estimated {in_gb(found.total)} on each process: {listed}"}


def network(run: Run) -> str:
    """Return the network's name, size and class slot."""
    config, facts = run.config, run.facts.network
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6
    shape = f"{facts.depth} blocks, width {facts.hidden_size}"
    standardized = f", standardised by {config.standardize_cls}" if config.standardize_cls else ""
    slot = "no class slot" if config.slot == "none" else f"class slot (--entangle {config.slot}{standardized})"
    return f"{config.model}, {shape}, {slot}; {parameters:.1f} M trainable parameters"


def encoders(run: Run) -> str:
    """Return the frozen encoders and their sizes, or their cached tokens."""
    if run.data.tokens:
        return ", ".join(f"{one.format.name} (cached tokens in {one.source.path.name})" for one in run.data.tokens)
    if not run.encoders:
        return "none"
    millions = (sum(p.numel() for p in encoder.parameters()) / 1e6 for encoder in run.encoders)
    return ", ".join(f"{found.name} ({size:.1f} M, frozen)" for found, size in zip(run.encoders, millions, strict=True))


def data(run: Run) -> str:
    """Return size, classes and latents of the data."""
    found, form, side = run.data, run.facts.latent_format, run.facts.network.input_size
    classes = len(found.classes.labels)
    named = f"{classes:,} {'class' if classes == 1 else 'classes'}"
    if not found.has_labels:
        named = "no labels" if run.config.unconditional else "no labels (one class, label 0)"
    named += " (trained without labels, --cfg-prob 1)" * run.config.unconditional
    count = f"{len(found):,} images of {found.resolution} px, {named}"
    unused = run.facts.network.num_classes - classes
    embedded = f" (the network has {run.facts.network.num_classes:,})" if unused else ""
    assumed = "" if found.names_codec else " (assumed, no dataset.json names it; preprocessing/verify.py checks it)"
    drawn = ", one draw per image" if found.stored == "draw" else ""
    latents = f"latents {form.channels} x {side} x {side}{drawn}, codec {form.codec}{assumed}"
    return f"{found.data_dir}: {count}{embedded}, {latents}"


def loss(run: Run) -> str:
    """Return the terms of the loss with their weights."""
    weights = {term.name: run.criterion.weights.get(term.name, term.weight) for term in TERMS}
    applies = {"proj": bool(run.facts.network.z_dims), "cls": bool(run.facts.network.cls_token_dim)}
    applies["cfm"] = run.config.cfm_coeff > 0
    until = {"proj": f" until step {run.config.align_stop_steps}" if run.config.align_stop_steps else ""}
    terms = [f"{weight:g} {name}{until.get(name, '')}" for name, weight in weights.items() if applies.get(name, True)]
    return f"{' + '.join(terms)}; {run.config.path_type} path{times(run)}"


def times(run: Run) -> str:
    """Return the distribution of training times, their shift and the class token's lead, if not the defaults."""
    config, shift = run.config, run.facts.path.time_shift
    parts = [f"lognormal times ({config.time_mean:g}, {config.time_std:g})"] * (config.weighting == "lognormal")
    parts += [f"time shift {shift:.4g}"] * (shift != 1)
    parts += [f"class token leads by {config.cls_lead:g}"] * (config.cls_lead > 0)
    return "".join(f", {part}" for part in parts)


def files(run: Run) -> str:
    """Return how often files are written."""
    config = run.config
    minutes = f" and {config.checkpointing_minutes:g} min" if config.checkpointing_minutes else ""
    every = {"row": config.log_steps, "checkpoint": config.checkpointing_steps, "grid": config.sampling_steps}
    every |= {f"scores of {config.eval_samples:,} samples": config.eval_steps}
    parts = [
        f"{name} every {f'{steps:,} steps' if steps > 1 else 'step'}{minutes if name == 'checkpoint' else ''}"
        for name, steps in every.items()
        if steps
    ]
    return ", ".join(parts)


def row_line(row: dict[str, Any], last_step: int, seconds_left: float | None) -> str:
    """Return the line of a row of metrics.jsonl."""
    parts = [f"step {row['step']:{len(str(last_step))}} / {last_step}"]
    parts += [f"{name} {row[name]:.4f}" for name in SHOWN if row.get(name) is not None]
    if math.isfinite(speed := row["images_per_second"]):
        parts.append(f"{speed:,.{0 if speed >= 100 else 1}f} images/s")
    parts += [f"MFU {row['mfu']:.0%}"] if "mfu" in row else []
    parts += [f"{row['data_wait']:.0%} of the time waiting for data"] if row["data_wait"] >= NOTABLE_WAIT else []
    parts += [f"{row[name]} {name.replace('_', ' ')}" for name in ("bad_steps", "overflow_steps") if row.get(name)]
    parts += [f"{duration(seconds_left)} left"] if seconds_left else []
    return "  ".join(parts)


def score_line(step: int, scores: dict[str, Any], seconds: float, best: bool) -> str:
    """Return the line of an evaluation."""
    values = ", ".join(f"{title} {scores[name]:.4g}" for name, title in SCORES.items() if name in scores)
    of_best = "; the best FID so far" if best else ""
    return f"evaluation at step {step}: {values} ({scores['num_samples']:,} samples, {duration(seconds)}){of_best}"


def duration(seconds: float) -> str:
    """Return a duration such as 0:01:23 or 2 days, 0:01:23."""
    return str(timedelta(seconds=round(seconds)))


def ending(run: Run, last_step: int) -> list[str]:
    """Return the lines that say, after the last checkpoint, where things are and how to continue."""
    folder, log = run.folder, run.log
    if run.step < last_step:
        source = "the previous checkpoint" if run.writer.failure else "this step"
        return [
            f"stopped at step {run.step} of {last_step}; the same command with --resume latest resumes from {source}"
        ]
    checkpoint = folder / "checkpoints" / f"{run.step:07d}.pt"
    lines = [f"finished at step {run.step} after {duration(log.seconds)}"]
    lines += [f"checkpoint   {checkpoint}"] if checkpoint.exists() else []
    if (folder / "checkpoints" / "best.pt").exists():
        lines += [f"best FID     {folder / 'checkpoints' / 'best.pt'}"]
    lines += [f"loss curves  {log.picture}", f"numbers      {log.metrics}", f"log          {folder / 'log.txt'}"]
    lines += [f"samples      {folder / 'samples'}"] if run.config.sampling_steps else []
    lines += [f"next         python generate.py --ckpt {shlex.quote(str(checkpoint))}"] if checkpoint.exists() else []
    return lines
