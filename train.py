"""Train REG, REPA or SiT (arXiv 2507.01467): command line, set-up, loop.

    accelerate launch train.py --data-dir DATA --exp-name NAME --model SiT-XL/2

The defaults are the paper's recipe. A run lives in OUTPUT_DIR/EXP_NAME: args.json, metrics.jsonl, loss.png,
checkpoints/, samples/. Everything random in step s comes from (seed, s) alone and is drawn for the whole global batch,
so a run is the same run on any number of processes, and after any interruption.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.io import InputError, read_json, run_cli, unlock_folder, write_json
from dataset import ErrorsAsItems, GlobalBatchSampler, collate, raise_errors
from loss import TrainingNoise, alignment_target, entangled_token
from models import ema
from models.encoders import Encoder
from samplers import derive_seed
from training.config import parse_args
from training.parallelism import to_device, whole, whole_norm
from training.preemption import StopSignal, exit_status, shield_worker
from training.sampling import score_samples, write_reconstructions, write_samples
from training.setup import Run, agree, set_up

TRAINING_STREAM = 1  # keeps the noise of training apart from everything else that comes from the seed


def train(run: Run) -> bool:
    """Run the training loop; return whether to its end, not stopped before by a signal."""
    args, accelerator = run.args, run.accelerator
    last_step = args.max_train_steps
    if args.epochs is not None:
        last_step = min(last_step, max(1, args.epochs * len(run.data) // args.batch_size))
    batches = load_batches(run, range(run.step, last_step))
    if run.step == 0:
        write_reconstructions(run)
    bar = tqdm(total=last_step, initial=run.step, desc=args.exp_name, disable=not accelerator.is_main_process)
    run.model.train()
    while run.step < last_step and "stop" not in run.wishes:
        training_step(run, batches)
        run.step += 1
        bar.update()
        last = run.step == last_step
        read_reports(run)
        if run.step % args.log_steps == 0 or last:
            read_reports(run, all_sent=True)
            row = run.log.write_row(run.step, epoch=run.step * args.batch_size / len(run.data))
            bar.set_postfix({name: f"{row[name]:.3f}" for name in ("loss", "denoise", "proj", "cls") if name in row})
        if args.sampling_steps and (run.step % args.sampling_steps == 0 or last):
            write_samples(run)
        if args.eval_steps and (run.step % args.eval_steps == 0 or last):
            evaluate(run)
        if run.step % args.checkpointing_steps == 0 or last or run.wishes:
            save(run)
    bar.close()
    batches.close()
    run.log.draw()
    run.writer.finish()
    if accelerator.is_main_process:
        unlock_folder(run.folder)
    accelerator.wait_for_everyone()  # a launcher ends all soon after the first has gone
    if run.step < last_step:
        whence = "the checkpoint before" if run.writer.failure else "there"
        accelerator.print(f"stopped at step {run.step}; --resume latest goes on from {whence}")
    if run.step == last_step and run.writer.failure:
        raise InputError(f"{run.writer.failure}; make room, then go on from the one before by --resume latest")
    accelerator.end_training()
    return run.step == last_step


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
                cls_token, encoder_tokens = encode(run.encoders, images, x, args.entangle, args.proj_coeff > 0)
                terms = run.criterion(
                    run.model, x, y, cls_token, encoder_tokens, rows.t, rows.noise, rows.cls_noise, rows.label_drop
                )
            accelerator.backward(terms.total.mean())
            run.reports.add(terms.named(), t=rows.t, label=y)
            if accelerator.sync_gradients:
                grad_norm = whole_norm(accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm))
                good = grad_norm.isfinite().float()
                run.optimizer.optimizer.found_inf = 1 - good  # leaves out the update, decided on the device
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
    ema.update(run.ema, accelerator.unwrap_model(run.model), args.ema_decay, good)
    run.reports.send(run.step, grad_norm, own_wishes(run))
    run.log.end_step()


def own_wishes(run: Run) -> set[str]:
    """Return what this process asks all processes for: to stop, or to save anew what could not be saved."""
    wishes = {"stop"} if run.stop_signal.received else set()
    if run.writer.failure and run.step >= run.retry_save_at:
        wishes.add("save")
    return wishes


def read_reports(run: Run, all_sent: bool = False) -> None:
    """Take in what is known by now of the steps; with `all_sent`, wait for the device and take in all of them."""
    for report in run.reports.receive(all_sent):
        run.wishes |= report.wishes
        run.bad_steps.note(report)
        if report.good:
            run.log.add(report.means)


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
def encode(
    encoders: list[Encoder], images: Tensor, x: Tensor, entangle: str, align: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Return what is entangled with latents x, (N, D) or None, and the alignment targets of uint8 images."""
    outputs = [encoder(images) for encoder in encoders]
    cls_token = entangled_token(entangle, outputs[0] if outputs else None, x)
    return cls_token, [alignment_target(*output, entangle != "none") for output in outputs] if align else []


def load_batches(run: Run, steps: range) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
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
        ErrorsAsItems(run.data),
        collate_fn=collate,
        batch_sampler=sampler,
        num_workers=args.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        prefetch_factor=4 if args.num_workers else None,
        worker_init_fn=shield_worker,
    )
    yield from to_device(raise_errors(loader), accelerator.device)


def save(run: Run, name: str | None = None) -> None:
    """Have a checkpoint written, by default named after its step: the published keys, and what a continuation needs."""
    accelerator = run.accelerator
    read_reports(run, all_sent=True)
    run.wishes.discard("save")
    run.retry_save_at = run.step + run.args.retry_steps
    network = accelerator.unwrap_model(run.model)
    states = {"model": network.state_dict(), "ema": run.ema.state_dict(), "opt": run.optimizer.state_dict()}
    states = whole(states, keep=accelerator.is_main_process)  # shards come from all processes
    if accelerator.is_main_process:
        content = {
            **states,
            "args": run.args,
            "steps": run.step,
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            "log": run.log.state(),
        }
        run.writer.save(run.step, content, name)


def evaluate(run: Run) -> None:
    """Score EMA samples, write the scores to metrics.jsonl, and keep the checkpoint of the best FID as best.pt."""
    scores = score_samples(run)
    run.log.append({"step": run.step, **scores})
    best = run.folder / "checkpoints" / "best.json"
    is_best = not best.exists() or scores["fid"] < read_json(best)["fid"]
    if agree(run.accelerator, is_best):  # all save or none, whatever a machine sees of the folder by now
        save(run, "best")
        run.writer.finish()
        if run.accelerator.is_main_process and not run.writer.failure:
            write_json(best, {"step": run.step, **scores})


def main() -> None:
    """Train as the command line says."""
    stop_signal = StopSignal()
    stop_signal.listen()
    finished = train(set_up(parse_args(), stop_signal))
    sys.exit(exit_status(finished))


if __name__ == "__main__":
    run_cli(main)
