"""Images of a run during training: grids of EMA samples, decoded real latents, samples that are scored."""

from __future__ import annotations

import gc
import math

import torch
from torch import Tensor

from common.classes import ClassSet
from common.images import image_grid, save_png
from evaluations.coherence import CoherenceSums, class_mean_sums
from loss import FROM_ENCODER, entangled_token
from models.inference import FastNetwork, fast_network
from models.sit import SiT
from samplers import Guidance, image_seeds, sample_images
from training.messages import logger, warn_if_unwritable
from training.parallelism import gather_full
from training.state import Run

MAX_COLUMNS = 12  # of a grid with a column for each class


def write_samples(run: Run) -> None:
    """Write a grid of EMA samples to the run's folder and the tracker.

    Image n always has the same label, that of `image_labels`, and the same noise, that of (seed, n).
    """
    network = averaged_network(run)
    if run.accelerator.is_main_process:
        config = run.config
        guidance = Guidance(config.grid_cfg_scale)
        labelled = not config.unconditional
        columns = grid_columns(len(run.data.classes.labels), config.grid_samples) if labelled else None
        numbers = range(config.grid_samples - config.grid_samples % (columns or 1))  # complete rows
        latents, _ = draw_latents(run, network, numbers, config.grid_num_steps, guidance)
        if broken := int(count_broken(latents)):
            logger.warning("step %d: %d of %d samples of the grid are not finite", run.step, broken, len(latents))
        labels = image_labels(run, numbers) if labelled else None
        write_grid(run, f"{run.step:07d}", latents, labels, columns)
    run.accelerator.wait_for_everyone()


def score_samples(run: Run) -> dict[str, float]:
    """Return the scores of EMA samples, generated without guidance by all processes.

    With an encoder's token in the class slot these include the coherence of the samples (evaluations/coherence.py).
    If a sample is not finite, all scores are NaN, with a warning.
    """
    scores = _scores(run)
    # The training step needs the memory of the CUDA graphs, and with FSDP that of the full network.
    gc.collect()  # compiled blocks are part of reference cycles
    torch.cuda.empty_cache()  # does nothing without a GPU
    return scores


def _scores(run: Run) -> dict[str, float]:
    config, device, slot = run.config, run.accelerator.device, run.config.slot
    network = averaged_network(run)
    batch_size = min(config.eval_batch_size, config.eval_samples)
    fast = fast_network(network, batch_size, config.compile, cuda_graphs=device.type == "cuda")
    labelled = not config.unconditional
    sums = CoherenceSums(run.facts.network.cls_token_dim, device, labelled) if slot in FROM_ENCODER else None
    if sums is not None and labelled and run.class_centres is None:
        run.class_centres = class_centres(run)

    broken = torch.zeros((), device=device)

    def draw(numbers: range) -> Tensor:
        latents, cls_tokens = draw_latents(run, network, numbers, config.eval_num_steps, Guidance(), fast)
        broken.add_(count_broken(latents, cls_tokens))
        images = run.codec.decode(latents)
        if sums is not None:
            encoded = entangled_token(slot, run.encoders[0].forward(images), None)  # not compiled for these shapes
            labels = torch.tensor(image_labels(run, numbers), device=device)
            sums.update(cls_tokens, encoded, *((labels, run.class_centres) if labelled else ()))
        return images

    scores = {**run.evaluation(draw), "num_steps": config.eval_num_steps}
    if sums is not None:
        sums.load_state_dict(run.accelerator.reduce(sums.state_dict(), "sum"))
        scores |= sums.scores()
    if broken := int(run.accelerator.reduce(broken, "sum")):
        logger.warning("step %d: no scores, %d of the samples are not finite", run.step, broken)
        scores |= {name: math.nan for name, value in scores.items() if isinstance(value, float)}
    return scores


def count_broken(*parts: Tensor | None) -> Tensor:
    """Return the number of samples that are not finite in one of `parts`, (N, ...) each, on their device."""
    finite = [part.flatten(1).isfinite().all(1) for part in parts if part is not None]
    return (~torch.stack(finite).all(0)).sum()


def averaged_network(run: Run) -> SiT:
    """Return the EMA network for sampling, for which it may be compiled: `run.ema` stays as it is.

    It has the tensors of `run.ema`; for a sharded run, full copies. All processes must call it.
    """
    with torch.device("meta"):
        network = SiT(run.facts.network, fused_attn=run.config.fused_attn)
    network.load_state_dict(gather_full(run.ema.state_dict()), assign=True)
    return network.to(run.accelerator.device).eval().requires_grad_(False)


def class_centres(run: Run) -> Tensor:
    """Return the mean token of each class over real training images, (K, D). The processes share the work."""
    accelerator = run.accelerator
    sums = class_mean_sums(
        run.encoders[0],
        run.config.slot,
        run.data,
        run.config.eval_batch_size,
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
    )
    sums.load_state_dict(accelerator.reduce(sums.state_dict(), "sum"))
    return sums.centres()


def write_reconstructions(run: Run) -> None:
    """Write a grid of decoded real latents: an upper bound for the samples, and a check of data and codec."""
    if run.config.sampling_steps and run.accelerator.is_main_process:
        count = min(run.config.grid_samples, len(run.data))
        chosen = [i * len(run.data) // count for i in range(count)]  # from all classes
        stored = torch.stack([torch.from_numpy(run.data.read_latents(i)) for i in chosen]).to(run.accelerator.device)
        labels = [int(run.data.labels[i]) for i in chosen]
        write_grid(run, "reconstructions", run.facts.latent_format.sample(stored, None), labels)


def image_labels(run: Run, numbers: range) -> list[int]:
    """Return the labels of images given by number: the classes of the data in turn; without labels the null class."""
    labels = (run.facts.network.num_classes,) if run.config.unconditional else run.data.classes.labels
    return [labels[number % len(labels)] for number in numbers]


def draw_latents(
    run: Run, network: SiT, numbers: range, num_steps: int, guidance: Guidance, fast: FastNetwork | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return latents (N, C, h, w) and class tokens (N, D) or None, of images given by number.

    The network computes in the precision of the run. It is under autocast, not converted: a copy in half precision
    would need memory, and its activations can overflow in float16, where those of training do not.
    fast: how `network` is called; None: directly.
    """
    with run.accelerator.autocast():
        return sample_images(
            network,
            labels=image_labels(run, numbers),
            seeds=image_seeds(run.config.seed, numbers),
            interpolant=run.criterion.path,
            guidance=guidance,
            num_steps=num_steps,
            **(fast._asdict() if fast else {}),
        )


def grid_columns(classes: int, samples: int) -> int | None:
    """Return how many columns a grid of samples, of the classes in turn, has so that each column is of one class.

    None if there are too many classes, or only one.
    """
    if not 1 < classes <= min(samples, MAX_COLUMNS):
        return None
    return classes * max(1, math.ceil(math.sqrt(samples)) // classes)


def grid_captions(classes: ClassSet, labels: list[int], columns: int | None) -> list[str | None] | None:
    """Return the captions of a grid: the class of each image, or of each column of a class. None for a single class."""
    if len(classes.labels) == 1:
        return None
    return [
        classes.caption(label) if number < (columns or len(labels)) else None for number, label in enumerate(labels)
    ]


def write_grid(run: Run, name: str, latents: Tensor, labels: list[int] | None, columns: int | None = None) -> None:
    """Decode latents and write them as samples/NAME.png with captions, and to the tracker.

    labels: of the images; None: no captions. columns: as `grid_columns` returns it; None: a square grid.
    """
    images = run.codec.decode(latents.float()).permute(0, 2, 3, 1).cpu().numpy()
    captions = None if labels is None else grid_captions(run.data.classes, labels, columns)
    grid = image_grid(images, columns, captions=captions)
    path = run.folder / "samples" / f"{name}.png"
    with warn_if_unwritable(str(path)):
        save_png(path, grid)
        logger.info("grid %s: %d images", path, len(images))
    run.log.track_picture(grid, run.step)
