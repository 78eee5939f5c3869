"""Train REG, REPA or SiT (arXiv 2507.01467): command line, set-up, loop.

    accelerate launch train.py --data-dir DATA --exp-name NAME --model SiT-XL/2

The defaults are the paper's recipe. A run lives in OUTPUT_DIR/EXP_NAME: args.json, metrics.jsonl, loss.png,
checkpoints/, samples/. Everything random in step s comes from (seed, s) alone and is drawn for the whole global batch,
so a run is the same run on any number of processes, and after any interruption.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset import GlobalBatchSampler, LatentDataset
from evaluations.in_training import TrainingEvaluation
from files import InputError, read_json, run_cli, write_json
from loss import REGLoss, TrainingNoise, alignment_target
from models import ema
from models.autoencoder import Codec, load_codec
from models.checkpoint import is_legacy, latest_checkpoint, load_checkpoint, network_weights, save_checkpoint
from models.encoders import Encoder, load_encoders
from models.interpolant import Interpolant
from models.sit import ENCODER_DEPTHS, PRESETS, SiT, SiT_models
from pictures import image_grid, save_png
from run_log import RunLog
from samplers import Guidance, derive_seed, sample_images
from train_settings import check_same_run, flag, parse_args

TRAINING_STREAM = 1  # keeps the noise of training apart from that of images, whose key is (seed, number)


@dataclass
class Run:
    """One training run: what `set_up` built and `train` moves on."""

    args: argparse.Namespace
    folder: Path
    accelerator: Accelerator
    data: LatentDataset
    encoders: list[Encoder]
    codec: Codec | None  # decodes samples, where they are wanted
    model: torch.nn.Module
    ema: SiT
    optimizer: torch.optim.Optimizer
    criterion: REGLoss
    evaluation: TrainingEvaluation | None
    log: RunLog
    step: int  # optimiser steps done


def train(run: Run) -> None:
    """Run the training loop to its end."""
    args, accelerator = run.args, run.accelerator
    last_step = min(args.max_train_steps, max(1, args.epochs * len(run.data) // args.batch_size))
    batches = load_batches(run, range(run.step, last_step))
    if run.step == 0:
        write_reconstructions(run)
    bar = tqdm(total=last_step, initial=run.step, desc=args.exp_name, disable=not accelerator.is_main_process)
    run.model.train()
    while run.step < last_step:
        training_step(run, batches)
        run.step += 1
        bar.update()
        last = run.step == last_step
        if run.step % args.log_steps == 0 or last:
            row = run.log.write_row(run.step, epoch=run.step * args.batch_size / len(run.data))
            bar.set_postfix({name: f"{row[name]:.3f}" for name in ("loss", "denoise", "proj", "cls") if name in row})
        if args.sampling_steps and (run.step % args.sampling_steps == 0 or last):
            write_samples(run)
        if args.eval_steps and (run.step % args.eval_steps == 0 or last):
            evaluate(run)
        if run.step % args.checkpointing_steps == 0 or last:
            save(run)
    bar.close()
    accelerator.end_training()


def training_step(run: Run, batches: Iterator[tuple[Tensor, Tensor, Tensor]]) -> None:
    """One optimiser step: the whole method on one screen. Nothing here waits for the device."""
    args, accelerator, parts = run.args, run.accelerator, run.args.gradient_accumulation_steps
    noise = step_noise(run)
    for part in range(parts):
        with run.log.waiting_for_data():
            images, moments, y = next(batches)
        first = (accelerator.process_index * parts + part) * len(y)
        rows = noise.rows(first, first + len(y))
        x = run.data.latent_format.sample(moments, rows.latent_noise)
        with accelerator.accumulate(run.model):
            with accelerator.autocast():
                cls_token, encoder_tokens = encode(run.encoders, images, args.cls_token, args.proj_coeff > 0)
                terms = run.criterion(
                    run.model, x, y, cls_token, encoder_tokens, rows.t, rows.noise, rows.cls_noise, rows.label_drop
                )
            accelerator.backward(terms.total.mean())
            for name, values in terms.named().items():
                run.log.add(name, values.mean() / parts)
            if accelerator.sync_gradients:
                run.log.add("grad_norm", accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm))
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
    if not accelerator.optimizer_step_was_skipped:  # the loss scaler leaves out steps that overflow
        ema.update(run.ema, accelerator.unwrap_model(run.model), args.ema_decay)
    run.log.end_step()


def step_noise(run: Run) -> TrainingNoise:
    """Return everything random of the coming step, for the whole global batch."""
    args, network = run.args, run.ema
    generator = torch.Generator(run.accelerator.device)
    generator.manual_seed(derive_seed(args.seed, TRAINING_STREAM, run.step))
    return TrainingNoise.draw(
        generator,
        args.batch_size,
        (network.in_channels, network.input_size, network.input_size),
        network.cls_token_dim,
        run.criterion.interpolant,
        args.weighting,
        args.cfg_prob,
    )


@torch.no_grad()
def encode(encoders: list[Encoder], images: Tensor, with_cls: bool, align: bool) -> tuple[Tensor | None, list[Tensor]]:
    """Return the class token (N, D) of the first encoder and the alignment targets of all, for uint8 images."""
    outputs = [encoder(images) for encoder in encoders]
    cls_token = outputs[0].cls_token.float() if with_cls else None
    return cls_token, [alignment_target(*output, with_cls) for output in outputs] if align else []


def load_batches(run: Run, steps: range) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield images, moments and labels on the device, for the parts of each of `steps` that belong to this process."""
    args, accelerator = run.args, run.accelerator
    sampler = GlobalBatchSampler(
        len(run.data),
        args.batch_size,
        args.seed,
        steps,
        accelerator.process_index,
        accelerator.num_processes,
        args.gradient_accumulation_steps,
        args.flip,
    )
    loader = DataLoader(
        run.data,
        batch_sampler=sampler,
        num_workers=args.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        prefetch_factor=4 if args.num_workers else None,
    )
    for batch in loader:
        yield tuple(tensor.to(accelerator.device, non_blocking=True) for tensor in batch)


def save(run: Run, name: str | None = None) -> None:
    """Write a checkpoint, by default named after the step: the published keys, and what a continuation needs."""
    accelerator = run.accelerator
    if accelerator.is_main_process:
        content = {
            "model": accelerator.unwrap_model(run.model).state_dict(),
            "ema": run.ema.state_dict(),
            "opt": run.optimizer.state_dict(),
            "args": run.args,
            "steps": run.step,
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            "log": run.log.state(),
        }
        save_checkpoint(run.folder / "checkpoints" / f"{name or f'{run.step:07d}'}.pt", content)
        run.log.draw()
    accelerator.wait_for_everyone()


def evaluate(run: Run) -> None:
    """Score EMA samples, write the scores to metrics.jsonl, and keep the checkpoint of the best FID as best.pt."""
    steps, unguided = run.args.eval_num_steps, Guidance()
    scores = run.evaluation(lambda numbers: run.codec.decode(draw_latents(run, numbers, steps, unguided)))
    run.log.append({"step": run.step, **scores})
    best = run.folder / "checkpoints" / "best.json"
    run.accelerator.wait_for_everyone()  # everyone reads the best so far before it is replaced
    is_best = not best.exists() or scores["fid"] < read_json(best)["fid"]
    if is_best:
        save(run, "best")
        if run.accelerator.is_main_process:
            write_json(best, {"step": run.step, **scores})


def write_samples(run: Run) -> None:
    """Write a grid of EMA samples, the same noise and labels each time, to the run's folder and to the tracker."""
    if run.accelerator.is_main_process:
        args = run.args
        guidance = Guidance(args.grid_cfg_scale, args.grid_cfg_scale)
        write_grid(run, f"{run.step:07d}", draw_latents(run, range(args.grid_samples), args.grid_num_steps, guidance))
        run.log.draw()
    run.accelerator.wait_for_everyone()


def draw_latents(run: Run, numbers: range, num_steps: int, guidance: Guidance) -> Tensor:
    """Return the EMA network's latents (N, C, h, w) of images given by number, each class as often as any other."""
    latents, _ = sample_images(
        run.ema,
        labels=[number % run.ema.num_classes for number in numbers],
        seeds=[derive_seed(run.args.seed, number) for number in numbers],
        interpolant=run.criterion.interpolant,
        guidance=guidance,
        num_steps=num_steps,
    )
    return latents


def write_reconstructions(run: Run) -> None:
    """Write a grid of real latents, decoded: what samples can look like at best, and a check of data and codec."""
    if run.args.sampling_steps and run.accelerator.is_main_process:
        moments = torch.stack([run.data[i][1] for i in range(min(run.args.grid_samples, len(run.data)))])
        write_grid(run, "reconstructions", run.data.latent_format.sample(moments.to(run.accelerator.device), None))


def write_grid(run: Run, name: str, latents: Tensor) -> None:
    """Decode latents and write them as samples/NAME.png; to the tracker as well."""
    grid = image_grid(run.codec.decode(latents.float()).permute(0, 2, 3, 1).cpu().numpy())
    save_png(run.folder / "samples" / f"{name}.png", grid)
    for tracker in run.accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            tracker.log({"samples": wandb.Image(grid)}, step=run.step)
        elif tracker.name == "tensorboard":
            tracker.writer.add_image("samples", np.asarray(grid), run.step, dataformats="HWC")


def main() -> None:
    """Train as the command line says."""
    train(set_up(parse_args()))


def set_up(args: argparse.Namespace) -> Run:
    """Return a run ready to train: everything is checked and built before any work starts."""
    accelerator = make_accelerator(args)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    folder = Path(args.output_dir) / args.exp_name
    checkpoint = find_checkpoint(args, folder)
    data = open_data(args, accelerator)
    device = accelerator.device

    tokens = (data.latent_size // int(args.model.rsplit("/")[1])) ** 2
    encoders = []
    if args.enc_type != "none" and (args.cls_token or args.proj_coeff > 0):
        encoders = load_encoders(args.enc_type, data.resolution, args.enc_weights, tokens, device)
    codec = None
    if args.eval_steps or (args.sampling_steps and accelerator.is_main_process):
        codec = load_codec(args.vae or data.latent_format.codec, device)
    evaluation = make_evaluation(args, accelerator, encoders)
    describe_run(args, data, encoders)
    if checkpoint is not None:
        check_same_run(args, vars(checkpoint["args"]), "the checkpoint's run")

    model = build_network(args).to(device)
    average = ema.averaged_copy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    if checkpoint is not None:
        restore(checkpoint, model, average, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    if checkpoint is not None and accelerator.scaler is not None and checkpoint.get("scaler"):
        accelerator.scaler.load_state_dict(checkpoint["scaler"])

    step = checkpoint["steps"] if checkpoint else 0
    if accelerator.is_main_process:
        write_json(folder / "args.json", vars(args))
    start_tracker(args, accelerator, folder)
    log = RunLog(
        folder,
        args.batch_size,
        accelerator.is_main_process,
        lambda tensor: accelerator.reduce(tensor.to(device), "mean"),
        lambda row, at: accelerator.log(row, step=at),
        checkpoint.get("log") if checkpoint else None,
        step,
    )
    criterion = REGLoss(Interpolant(args.path_type), args.proj_coeff, args.cls, args.weighting)
    return Run(
        args, folder, accelerator, data, encoders, codec, model, average, optimizer, criterion, evaluation, log, step
    )


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Return accelerate's view of the processes and of the precision."""
    return Accelerator(
        cpu=args.device == "cpu",
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=str(Path(args.output_dir) / args.exp_name / args.logging_dir),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def find_checkpoint(args: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Return the checkpoint to go on from, or None for a new run. A folder that holds a run is never begun again."""
    checkpoints = folder / "checkpoints"
    if args.resume == "latest":
        path = latest_checkpoint(checkpoints)
        if path is None:
            if (folder / "args.json").exists():
                check_same_run(args, read_json(folder / "args.json"), folder / "args.json")
            return None
    elif args.resume or args.resume_step:
        path = Path(args.resume) if args.resume else checkpoints / f"{args.resume_step:07d}.pt"
    else:
        if (folder / "args.json").exists() or latest_checkpoint(checkpoints):
            raise InputError(
                f"{folder} holds a run already; go on with it by --resume latest, or choose another --exp-name"
            )
        return None
    checkpoint = load_checkpoint(path)
    if missing := {"model", "ema", "opt", "args", "steps"} - checkpoint.keys():
        raise InputError(f"{path}: to go on from it, it lacks {', '.join(sorted(missing))}")
    if args.legacy is not None and args.legacy != is_legacy(checkpoint):
        raise InputError(f"{flag('legacy')} {args.legacy}, but {path} has legacy layout {is_legacy(checkpoint)}")
    return checkpoint


def open_data(args: argparse.Namespace, accelerator: Accelerator) -> LatentDataset:
    """Return the training data, checked against the flags and, on the main process, file by file."""
    data = LatentDataset(args.data_dir, args.flip)
    for name, found in (("num_classes", data.num_classes), ("resolution", data.resolution)):
        given = getattr(args, name)
        if given is not None and given != found:
            raise InputError(f"{flag(name)} is {given}, but the data in {args.data_dir} have {found}")
    if args.check_data and accelerator.is_main_process:
        data.check(lambda files: tqdm(files, total=len(data), desc="checking the data", unit="file"))
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
    args.num_classes, args.resolution = data.num_classes, data.resolution
    args.in_channels, args.latent_size = data.latent_format.channels, data.latent_size
    args.codec = data.latent_format.to_json()
    args.z_dims = [encoder.width for encoder in encoders] if args.proj_coeff > 0 else []
    args.cls_token_dim = encoders[0].width if args.cls_token else None


def build_network(args: argparse.Namespace) -> SiT:
    """Return a fresh network of the described settings."""
    torch.manual_seed(args.seed)
    try:
        return SiT_models[args.model](
            input_size=args.latent_size,
            in_channels=args.in_channels,
            depth=args.depth,
            hidden_size=args.hidden_size,
            num_heads=args.num_heads,
            num_classes=args.num_classes,
            class_dropout_prob=args.cfg_prob,
            encoder_depth=args.encoder_depth,
            z_dims=args.z_dims,
            projector_dim=args.projector_dim,
            cls_token_dim=args.cls_token_dim,
            qk_norm=args.qk_norm,
            fused_attn=args.fused_attn,
        )
    except ValueError as error:
        raise InputError(f"--model {args.model} with the given sizes: {error}") from error


def restore(checkpoint: dict[str, Any], model: SiT, average: SiT, optimizer: torch.optim.Optimizer) -> None:
    """Load weights, averaged weights and the optimiser's state, strictly."""
    try:
        model.load_state_dict(network_weights(checkpoint, "model"))
        average.load_state_dict(network_weights(checkpoint, "ema"))
        optimizer.load_state_dict(checkpoint["opt"])
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the checkpoint does not fit the network of the flags: {error}") from error


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


if __name__ == "__main__":
    run_cli(main)
