"""Train REG, REPA or SiT (arXiv 2507.01467): command line, training loop, one step.

    accelerate launch train.py --data-dir DATA --exp-name NAME --model SiT-XL/2

The defaults are the paper's recipe. A run is a folder, OUTPUT_DIR/EXP_NAME: args.json, log.txt, metrics.jsonl,
loss.png, checkpoints/, samples/. Everything random in step s comes from (seed, s) only and is drawn for the global
batch (training/randomness.py), so a run is the same for any number of processes and after any interruption.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.distributed import broadcast_from_main
from common.errors import InputError, LostProcess, run_cli
from common.loader import ErrorsAsItems, batches_of, collate
from common.locks import unlock_folder
from common.progress import progress_bar
from dataset import GlobalBatchSampler
from loss import FROM_ENCODER, Targets, alignment_target, entangled_token
from models import ema
from models.cached_tokens import as_output
from training import summary
from training.best import is_best, write_best
from training.config import parse_args
from training.limits import in_gb
from training.messages import ROW, log_file, logger, show_rows
from training.parallelism import full_norm, gather_full, projectors_in_ddp, to_device, zero_with_gradients
from training.preemption import StopSignal, exit_status, shield_worker
from training.record import saved_args
from training.sampling import score_samples, write_reconstructions, write_samples
from training.schedule import rate_factor, varies
from training.setup import PREFETCHED, peak_images_per_second, peak_memory, set_up
from training.state import Run


def train(run: Run) -> bool:
    """Run the training loop; return whether it reached its last step, and was not stopped by a signal before."""
    config, accelerator = run.config, run.accelerator
    last_step = last_step_of(run)
    with log_file(run.folder / "log.txt", accelerator.process_index):
        announce(summary.starting(run, last_step))
        if run.step >= last_step:
            flags = "--max-train-steps" + " and --epochs" * (run.config.epochs is not None)
            logger.info("nothing to do: the run is at step %d, and %s ends it at step %d", run.step, flags, last_step)
        batches = load_batches(run, range(run.step, last_step))
        if run.step == 0:
            write_reconstructions(run)
        bar = progress_bar(total=last_step, initial=run.step, desc=config.exp_name, main=accelerator.is_main_process)
        show_rows(bar.disable or not sys.stdout.isatty())
        run.model.train()
        while run.step < last_step and not ends(run):
            training_step(run, batches)
            run.step += 1
            if run.step == config.align_stop_steps:
                run.log.peak_images_per_second = peak_images_per_second(config, run.facts, accelerator, run.step)
            bar.update()
            read_reports(run, wait_for_all=run.log.clock.in_first_step)
            if run.log.clock.in_first_step:
                run.log.clock.end_first_step()
            after_step(run, last_step, bar)
        bar.close()
        batches.close()
        finish(run, last_step)
    return run.step >= last_step


def last_step_of(run: Run) -> int:
    """Return the step at which the run ends, by --max-train-steps or --epochs."""
    config = run.config
    if config.epochs is None:
        return config.max_train_steps
    return min(config.max_train_steps, max(1, config.epochs * len(run.data) // config.batch_size))


def ends(run: Run) -> bool:
    """Return whether the run ends before its last step, after a checkpoint."""
    return bool(run.requests & {"stop", "lost"})


def row_due(run: Run, step: int) -> bool:
    """Return whether a row of metrics.jsonl is due after a step."""
    return run.config.log_steps > 0 and (step % run.config.log_steps == 0 or step == last_step_of(run))


def after_step(run: Run, last_step: int, bar: tqdm) -> None:
    """Write the row, grid, scores and checkpoint that are due. The clocks stand still, except for the row."""
    config = run.config

    def due(every: int) -> bool:
        return every > 0 and (run.step % every == 0 or run.step == last_step)

    if row_due(run, run.step):
        read_reports(run, wait_for_all=True)
        run.weights.record(run.step, finite=True)  # else the report had ended the run
        more = {"epoch": run.step * config.batch_size / len(run.data)}
        if varies(config):
            more["lr"] = config.learning_rate * rate_factor(config, run.step - 1, last_step)
        row = run.log.write_row(run.step, **more)
        logger.log(ROW, summary.row_line(row, last_step, run.log.clock.seconds_left(last_step - run.step)))
        bar.set_postfix({name: f"{row[name]:.3f}" for name in summary.SHOWN if name in row})
    regular = due(config.checkpointing_steps)
    if not (due(config.sampling_steps) or due(config.eval_steps) or regular or run.requests):
        return
    read_reports(run, wait_for_all=True)  # the time of these steps is training time
    with run.log.clock.stopped():
        run.weights.check(run.step)  # before they are sampled, scored or saved
        if due(config.sampling_steps):
            write_samples(run)
        if due(config.eval_steps):
            evaluate(run)
        if regular or run.requests:
            save(run, temporary=not regular and not ends(run))
    bar.unpause()


def training_step(run: Run, batches: Iterator[tuple[Tensor, ...]]) -> None:
    """Do one optimizer step: the complete method. Nothing here waits for the device."""
    accelerator, parts = run.accelerator, run.facts.micro_batches
    global_draws = run.randomness.draw(run.step)
    unaligned = [] if run.aligns else projectors_in_ddp(run.model)
    for part in range(parts):
        with run.log.clock.waiting_for_data():
            *seen, moments, y = next(batches)
        first = (accelerator.process_index * parts + part) * len(y)
        draws = global_draws.rows(first, first + len(y))
        x = run.facts.latent_format.sample(moments, draws.latent_noise)
        with accelerator.accumulate(run.model):
            with accelerator.autocast():
                targets = encode_tokens(run, seen, x)
                terms = run.criterion(run.model, x, y, targets, draws)
            loss = terms["loss"].mean()
            accelerator.backward(loss + zero_with_gradients(unaligned) if unaligned else loss)
            run.reports.add(terms, t=draws.t, label=y)
            if accelerator.sync_gradients:
                for weight in unaligned:  # with zeros, the optimizer would still move them by its moments
                    weight.grad = None
                grad_norm = full_norm(accelerator.clip_grad_norm_(run.model.parameters(), run.config.max_grad_norm))
                good = run.optimizer.step(grad_norm, rate_factor(run.config, run.step, last_step_of(run)))
                run.optimizer.zero_grad()
    ema.update(run.ema, accelerator.unwrap_model(run.model), run.config.ema_decay, good)
    finite_weights = run.weights.flag() if row_due(run, run.step + 1) else None
    run.reports.send(run.step, grad_norm, own_requests(run), finite_weights)
    run.log.clock.end_step()


@torch.no_grad()
def encode_tokens(run: Run, seen: Sequence[Tensor], x: Tensor) -> Targets:
    """Return what the encoders give for a batch with latents x (N, C, h, w).

    seen: the images (N, 3, R, R) uint8, or the cached tokens of each encoder, (N, 1 + T, D) float16.
    """
    slot = run.config.slot
    count = len(run.data.tokens or run.encoders) if run.aligns else int(slot in FROM_ENCODER)
    if run.data.tokens:
        outputs = [as_output(tokens) for tokens in seen[:count]]
    else:
        outputs = [encoder(*seen) for encoder in run.encoders[:count]]
    cls_token = entangled_token(slot, outputs[0] if outputs else None, x)
    if run.ema.cls_scale is not None:  # `run.model` may be wrapped; both have the same statistics
        cls_token = run.ema.cls_scale.standardize(cls_token)
    aligned = outputs if run.aligns else []
    with_cls, norm = slot != "none", run.config.spatial_norm
    return Targets(cls_token, [alignment_target(*output, with_cls, norm) for output in aligned])


def own_requests(run: Run) -> set[str]:
    """Return what this process asks all processes for: to end the run, or to save (after a failure, or by minutes)."""
    requests = {"stop"} if run.stop_signal.received else set()
    if run.lost_worker:
        requests.add("lost")
    failed = run.writer.failure and run.step >= run.retry_save_at
    if failed or (run.accelerator.is_main_process and run.writer.overdue):
        requests.add("save")
    return requests


def read_reports(run: Run, wait_for_all: bool = False) -> None:
    """Process the reports of steps that have arrived; with `wait_for_all`, of all steps."""
    for report in run.reports.receive(wait_for_all):
        if "stop" in report.requests - run.requests:
            logger.info("a signal asks the run to stop: it saves a checkpoint and ends")
        if "lost" in report.requests - run.requests:
            run.lost_worker = run.lost_worker or "a loader process of another process has ended"
            logger.warning("%s: the run saves a checkpoint and ends", run.lost_worker)
        run.requests |= report.requests
        run.bad_steps.record(report)
        if not report.finite_weights:
            run.weights.record(report.step + 1, finite=False)
        if report.good:
            run.log.add(report.means)


def load_batches(run: Run, steps: range) -> Generator[tuple[Tensor, ...], None, None]:
    """Yield images or cached tokens, moments, and labels on the device, as `LatentDataset` has them.

    These are the micro-batches of this process for each of `steps`.

    If a loader process is lost, this process reads the batches itself, so that the step can be completed and saved.
    """
    parts, yielded = run.facts.micro_batches, 0
    try:
        for batch in read_batches(run, steps, run.config.num_workers):
            yield batch
            yielded += 1
    except LostProcess as error:
        run.lost_worker = str(error)
        rest = range(steps.start + yielded // parts, steps.stop)
        yield from islice(read_batches(run, rest, workers=0), yielded % parts, None)


def read_batches(run: Run, steps: range, workers: int) -> Iterator[tuple[Tensor, ...]]:
    """Return an iterator over the micro-batches of this process, read by `workers` processes; see `load_batches`."""
    config, accelerator = run.config, run.accelerator
    sampler = GlobalBatchSampler(
        len(run.data),
        config.batch_size,
        config.seed,
        steps,
        accelerator.process_index,
        accelerator.num_processes,
        run.facts.micro_batches,
        config.flip,
    )
    loader = DataLoader(
        ErrorsAsItems(run.data),
        collate_fn=collate,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=accelerator.device.type == "cuda",
        prefetch_factor=PREFETCHED if workers else None,
        worker_init_fn=shield_worker,
    )
    return to_device(batches_of(loader, "--num-workers"), accelerator.device)


def save(run: Run, name: str | None = None, temporary: bool = False) -> None:
    """Write a checkpoint, by default named after its step: the published keys, and what resuming needs.

    A `temporary` one is removed when the next one is complete, see `CheckpointWriter`.
    """
    accelerator = run.accelerator
    read_reports(run, wait_for_all=True)
    run.requests.discard("save")
    run.retry_save_at = run.step + run.config.retry_steps
    network = accelerator.unwrap_model(run.model)
    states = {"model": network.state_dict(), "ema": run.ema.state_dict(), "opt": run.optimizer.state_dict()}
    states = gather_full(states, keep=accelerator.is_main_process)  # all processes contribute their shards
    if accelerator.is_main_process:
        content = {
            **states,
            "args": argparse.Namespace(**saved_args(run.config, run.facts)),
            "steps": run.step,
            "network": run.facts.network.to_json(),
            "classes": run.data.classes.to_json(),
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            "log": run.log.state(),
        }
        run.writer.save(run.step, content, name, temporary)


def evaluate(run: Run) -> None:
    """Score EMA samples, write the scores to metrics.jsonl, and keep the checkpoint of the best FID as best.pt."""
    started = time.perf_counter()
    scores = {"step": run.step, **score_samples(run)}
    run.log.append(scores)
    best = broadcast_from_main(run.accelerator, lambda: is_best(run.folder, scores))
    logger.info(summary.score_line(run.step, scores, time.perf_counter() - started, best))
    if best:
        save(run, "best")
        run.writer.finish()
        if run.accelerator.is_main_process and not run.writer.failure:
            write_best(run.folder, scores)


def finish(run: Run, last_step: int) -> None:
    """Complete the files of a run that ends or stops, and release its folder."""
    accelerator = run.accelerator
    run.log.draw()
    run.writer.finish()
    failure = run.writer.failure
    if accelerator.is_main_process:
        unlock_folder(run.folder)
    accelerator.wait_for_everyone()  # a launcher ends the other processes soon after the first one has exited
    if run.step >= last_step and failure:
        raise InputError(f"{failure}; free some space, then resume from the previous checkpoint by --resume latest")
    announce(summary.ending(run, last_step))
    accelerator.end_training()
    if "lost" in run.requests and run.step < last_step:
        raise LostProcess(run.lost_worker)


def announce(lines: list[str]) -> None:
    """Write lines to the console and to log.txt."""
    for line in lines:
        logger.info("%s", line)


def main() -> None:
    """Train as the command line says."""
    stop_signal = StopSignal()
    stop_signal.listen()
    run = set_up(parse_args(), stop_signal)
    if run.config.dry_run:
        try_steps(run)
    else:
        sys.exit(exit_status(train(run)))


def try_steps(run: Run, count: int = 2) -> None:
    """Print the settings, do `count` training steps without writing anything, and print what they took."""
    accelerator, size, seconds = run.accelerator, run.config.batch_size, []
    announce(summary.starting(run, last_step_of(run)))
    batches = load_batches(run, range(run.step, run.step + count))
    run.model.train()
    for _ in range(count):
        start = time.perf_counter()
        training_step(run, batches)
        run.step += 1
        read_reports(run, wait_for_all=True)
        seconds.append(time.perf_counter() - start)
    batches.close()
    run.weights.check(run.step)
    if run.lost_worker:
        raise LostProcess(run.lost_worker)
    estimate = in_gb(run.facts.memory.total)
    accelerator.print(
        f"dry run: {count} steps of {size} images done; the first took {seconds[0]:.2f} s, start-up included, the last "
        f"{seconds[-1]:.2f} s ({size / seconds[-1]:.1f} images/s); peak memory {peak_memory(accelerator.device)}, "
        f"estimated {estimate}; nothing was written to {run.folder}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    run_cli(
        main,
        memory_advice="give it a smaller --batch-size or, for the same step, more --gradient-accumulation-steps; "
        "--activation-checkpointing, and with several GPUs --fsdp, need less memory as well",
    )
