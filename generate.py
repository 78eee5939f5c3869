"""Generate images from a checkpoint (REG, arXiv 2507.01467) by the samplers of SiT (arXiv 2401.08740).

    python generate.py --ckpt CHECKPOINT                                        64 images
    accelerate launch generate.py --ckpt CHECKPOINT --num-fid-samples 50000     for FID, on all GPUs

The noise and the label of an image depend only on the seed and the image's number. The images are therefore the same
for any number of processes, and the same command completes an interrupted sample set. SAMPLE_DIR/NAME/ contains
images/, samples.npz (arr_0, the format that evaluators read), grid.png and samples.json.

Without --name, samples.npz also gets the name that the published script gives it in SAMPLE_DIR, as a link.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from common.checks import AUTO
from common.classes import ClassSet, label_ranges
from common.cli import changed, parse, uses_cuda
from common.distributed import (
    broadcast_from_main,
    check_same_files,
    largest_batch,
    long_collective_timeout,
    start_processes,
    to_host,
)
from common.errors import InputError, run_cli
from common.identity import Unchanged, files_of
from common.io import write_json
from common.progress import progress_bar
from evaluations.coherence import CoherenceReport
from generation.config import (
    DEFAULT_COUNT,
    GenerateConfig,
    check_against_checkpoint,
    choose_label_sampling,
    choose_path,
    image_labels,
    label_pool,
    unused_guidance,
)
from generation.naming import default_name, published_name
from generation.sample_set import DIGEST, SampleSet
from models.autoencoder import Codec, load_decoder, network_format
from models.checkpoint import (
    build_model,
    checkpoint_classes,
    load_with_digest,
    newest_of_run,
    resolve_checkpoint,
    saved_settings,
    steps_done,
)
from models.inference import NETWORK_DTYPES, convert, fast_network
from models.interpolant import Interpolant
from models.sit import SiT
from samplers import Guidance, image_seeds, sample_images

WRITER_THREADS = 4
LARGEST_BATCH = 256  # tried by --per-proc-batch-size auto; larger batches are not faster on any GPU
CPU_BATCH = 8
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} img [{elapsed}<{remaining}, {rate_fmt}]"


@dataclass(frozen=True)
class SamplePlan:
    """The settings, and what was loaded and found out for them. `warnings` are for the user."""

    config: GenerateConfig
    folder: Path
    path: Path  # of the checkpoint's file, or of the folder of an export
    digest: str  # SHA-256 of its file
    checkpoint: dict[str, Any]
    model: SiT
    codec: Codec
    coherence: CoherenceReport | None
    interpolant: Interpolant
    classes: ClassSet
    pool: tuple[int, ...]  # the labels to draw from
    labels: list[int]
    batch_size: int
    warnings: list[str]

    @property
    def has_labels(self) -> bool:
        """Whether images have labels other than the null class."""
        return self.config.label_sampling != "none"

    def record(self) -> dict[str, Any]:
        """Return the content of samples.json: the settings with their final values, and the checkpoint's identity."""
        config = self.config
        is_folder = config.vae is not None and Path(config.vae).is_dir()
        return {
            **asdict(config),
            "save_cls": config.with_cls_tokens,
            "solver": config.chosen_solver,
            "drawn_labels": label_ranges(self.pool) if self.has_labels else None,
            "cls_cfg_scale": config.guidance.cls_scale,
            "per_proc_batch_size": self.batch_size,
            "path_type": self.interpolant.path_type,
            "time_shift": self.interpolant.time_shift,
            "vae": config.vae if is_folder else self.codec.format.codec,
            "steps": steps_done(self.checkpoint, config.ckpt),
            DIGEST: self.digest,
        }


def main() -> None:
    """Generate images as the command line describes."""
    config = parse(GenerateConfig, "Generate images from a checkpoint.")
    accelerator = start_accelerator(config)
    plan = make_plan(config, accelerator)
    samples = SampleSet(plan.folder, len(plan.labels), plan.model.input_size * plan.codec.format.factor)

    def claim_folder() -> list[range]:
        data = plan.coherence and (plan.coherence.data.images.path, plan.coherence.data.latents.path)
        samples.claim(plan.record(), [*(data or ()), config.enc_weights, config.vae, plan.path])
        for line in newest_of_run(config.ckpt, plan.path):
            print(line)
        for warning in plan.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        batches = samples.missing_batches(plan.batch_size, config.with_cls_tokens)
        work = f"{sum(map(len, batches)):,} of {samples.total:,} images to generate"
        how = f"{plan.batch_size} per batch on {accelerator.num_processes} x {accelerator.device.type}"
        print(f"{samples.folder}: {work}, {how}", flush=True)
        return batches

    generate(plan, accelerator, samples, broadcast_from_main(accelerator, claim_folder))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(plan, samples)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def start_accelerator(config: GenerateConfig) -> Accelerator:
    """Return the accelerator, after setting this process's GPU and TF32."""
    if config.local_rank is not None and uses_cuda(config.device):
        if config.local_rank >= (count := torch.cuda.device_count()):
            raise InputError(f"--local-rank {config.local_rank}: PyTorch finds {count} GPUs; allowed: 0 .. {count - 1}")
        torch.cuda.set_device(config.local_rank)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    return start_processes(config.device, config.mixed_precision, kwargs_handlers=[long_collective_timeout()])


def make_plan(config: GenerateConfig, accelerator: Accelerator) -> SamplePlan:
    """Return the plan. Raises InputError if a file is missing or damaged, or a setting contradicts the checkpoint."""
    device = accelerator.device
    path = resolve_checkpoint(config.ckpt)
    if os.path.isdir(os.path.expanduser(config.ckpt)):  # a run's newest: training may add another one at any time
        path = broadcast_from_main(accelerator, lambda: path)
    opened = Unchanged(files_of(path))
    checkpoint, digest = load_with_digest(path)
    saved = saved_settings(checkpoint, config.ckpt)
    config = choose_label_sampling(config, saved)
    folder = Path(config.sample_dir) / (config.name or default_name(config, checkpoint))
    if config.num_fid_samples is None:
        config = changed(config, num_fid_samples=SampleSet.started_with(folder) or DEFAULT_COUNT)

    # Load the networks, and compare the settings with them.
    model = build_model(checkpoint, config.weights, device, config.fused_attn, source=config.ckpt)
    check_same_files(config.ckpt, opened.before, opened.now())  # tensors were read from the file until now
    latent_format = network_format(saved.get("codec"), model.config.in_channels, config.vae, config.ckpt)
    warnings = unused_guidance(config)
    warnings += check_against_checkpoint(config, checkpoint, model.config, latent_format)
    codec = load_decoder(latent_format, config.vae, device)
    coherence = None
    if config.coherence is not None:
        coherence = CoherenceReport(
            checkpoint, config.coherence, config.enc_weights, device, config.ckpt, config.num_fid_samples
        )
    interpolant, differences = choose_path(config, saved, model.config)
    warnings += differences

    # Draw the labels.
    classes = checkpoint_classes(checkpoint, model.num_classes, config.ckpt)
    pool = label_pool(config, classes, model.num_classes)
    if config.label_sampling != "none" and (untrained := classes.untrained(pool)):
        warnings.append(f"--classes {config.classes}: {untrained}")
    labels = image_labels(config, pool)

    convert(model, NETWORK_DTYPES[config.network_dtype])
    batch_size = config.per_proc_batch_size
    batch_size = find_batch_size(config, accelerator, model, codec) if batch_size == AUTO else batch_size
    return SamplePlan(
        config,
        folder,
        path,
        digest,
        checkpoint,
        model,
        codec,
        coherence,
        interpolant,
        classes,
        pool,
        labels,
        batch_size,
        warnings,
    )


def find_batch_size(config: GenerateConfig, accelerator: Accelerator, model: SiT, codec: Codec) -> int:
    """Return how many images fit into the memory of every process's GPU, with guidance and decoding."""
    if accelerator.device.type != "cuda":
        return CPU_BATCH
    guidance = Guidance(config.cfg_scale, path_drop=config.path_drop_guidance)  # at all times

    def attempt(count: int) -> None:
        network = fast_network(model, count, compiled=False, cuda_graphs=config.cuda_graphs).network
        numbers = [0] * count
        with accelerator.autocast():
            latents, _ = sample_images(model, numbers, numbers, Interpolant(), guidance, num_steps=1, network=network)
        codec.decode(latents.float())

    return largest_batch(attempt, LARGEST_BATCH)


def generate(plan: SamplePlan, accelerator: Accelerator, samples: SampleSet, batches: list[range]) -> None:
    """Write the images of `batches`. The list is the same on every process; each process takes its share.

    While a batch is sampled, threads write the images of the previous one.
    """
    config, model = plan.config, plan.model
    fast = fast_network(model, plan.batch_size, config.compile, config.cuda_graphs)
    sampler = (plan.interpolant, config.guidance, config.mode, config.chosen_solver, config.num_steps)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    # The main process shows the images of all processes, as if they were equally fast.
    total, done = sum(map(len, batches)), 0.0
    scale = total / max(1, sum(map(len, mine)))
    shown = {"desc": "generating", "unit": "img", "bar_format": BAR}
    bar = progress_bar(total=total, main=accelerator.is_main_process, lines=True, **shown)
    with ThreadPoolExecutor(WRITER_THREADS) as pool, bar:
        writing: list[Future[None]] = []
        for numbers in mine:
            steps_bar = partial(advance, bar, len(numbers) * scale)
            labels, seeds = [plan.labels[number] for number in numbers], image_seeds(config.global_seed, numbers)
            with accelerator.autocast():
                latents, cls_tokens = sample_images(
                    model, labels, seeds, *sampler, network=fast.network, rows=fast.rows, progress=steps_bar
                )
            latents = latents.float()
            images = if_finite(latents, to_host(plan.codec.decode(latents)), config.ckpt)
            if config.with_cls_tokens:
                cls_tokens = cls_tokens.float()
                cls_tokens = if_finite(cls_tokens, to_host(cls_tokens), config.ckpt)
            for future in writing:  # the previous batch
                future.result()
            done += len(numbers) * scale
            bar.update(done - bar.n)  # dopri5 shows no steps
            writing = [pool.submit(write_image, samples, images, row, number) for row, number in enumerate(numbers)]
            if config.with_cls_tokens:
                writing.append(pool.submit(write_cls_tokens, samples, cls_tokens, numbers))
        for future in writing:
            future.result()


def advance(bar: tqdm, images: float, steps: list[Any]) -> Iterator[Any]:
    """Yield the steps of a batch, and let all of them together move the bar by its number of images."""
    for step in steps:
        yield step
        bar.update(images / len(steps))


def if_finite(sampled: Tensor, get: Callable[[], np.ndarray], source: str) -> Callable[[], np.ndarray]:
    """Return a function that returns `get()`, or raises InputError if `sampled` contains NaN or infinity.

    The check runs on the device of `sampled`; this call does not wait for it.
    """
    get_finite = to_host(sampled.isfinite().all())

    def checked() -> np.ndarray:
        if not get_finite():
            raise InputError(f"{source}: its samples are not finite: the weights are damaged, or fp16 overflows")
        return get()

    return checked


def write_image(samples: SampleSet, images: Callable[[], np.ndarray], row: int, number: int) -> None:
    """Write image `number`, which is `row` of the array that `images()` returns."""
    samples.write_image(number, images()[row].transpose(1, 2, 0))


def write_cls_tokens(samples: SampleSet, cls_tokens: Callable[[], np.ndarray], numbers: range) -> None:
    """Write the class tokens of a batch."""
    samples.write_cls_tokens(numbers, cls_tokens())


def finish(plan: SamplePlan, samples: SampleSet) -> None:
    """Write the files of the complete set, unlock the folder, and print where they are."""
    config = plan.config
    balanced, labels = config.label_sampling == "balanced", plan.labels if plan.has_labels else None
    samples.finish(labels, balanced, config.with_cls_tokens, config.npz, plan.classes)
    if plan.coherence is not None:
        scores = plan.coherence(samples.read_images(), samples.read_cls_tokens(), labels)
        write_json(samples.folder / "coherence.json", scores)
    samples.release()
    print(f"{samples.folder / 'grid.png'}: the first images")
    if "num_fid_samples" not in config.given:
        print(f"{samples.total:,} images; for FID: --num-fid-samples 50000", file=sys.stderr)
    if config.npz and config.name is None:
        name = published_name(config, plan.checkpoint, plan.model.config, plan.codec.format, plan.path)
        if link := samples.link_npz(name):
            print(f"{link}: samples.npz under the name that the published script gives it")
        else:
            taken = samples.folder.parent / f"{name}.npz"
            print(
                f"warning: {taken} is another file and was kept; the published eval.sh would read it", file=sys.stderr
            )
    print(samples.folder / ("samples.npz" if config.npz else "images"))


if __name__ == "__main__":
    run_cli(main, memory_advice="give it a smaller --per-proc-batch-size")
