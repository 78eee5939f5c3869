"""The images a run leaves while it trains: grids of EMA samples, real latents decoded, samples to be scored."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.sit import SiT
from pictures import image_grid, save_png
from samplers import Guidance, derive_seed, sample_images
from training.run_log import going_on_despite
from training.setup import Run, averaged_network


def write_samples(run: Run) -> None:
    """Write a grid of EMA samples, the same noise and labels each time, to the run's folder and to the tracker."""
    network = averaged_network(run)
    if run.accelerator.is_main_process:
        args = run.args
        guidance = Guidance(args.grid_cfg_scale, args.grid_cfg_scale)
        latents = draw_latents(run, network, range(args.grid_samples), args.grid_num_steps, guidance)
        write_grid(run, f"{run.step:07d}", latents)
        run.log.draw()
    run.accelerator.wait_for_everyone()


def score_samples(run: Run) -> dict[str, float]:
    """Return the scores of EMA samples, made without guidance by all processes."""
    network, steps, unguided = averaged_network(run), run.args.eval_num_steps, Guidance()
    return run.evaluation(lambda numbers: run.codec.decode(draw_latents(run, network, numbers, steps, unguided)))


def write_reconstructions(run: Run) -> None:
    """Write a grid of real latents, decoded: what samples can look like at best, and a check of data and codec."""
    if run.args.sampling_steps and run.accelerator.is_main_process:
        wanted = min(run.args.grid_samples, len(run.data))
        moments = torch.stack([run.data[i * len(run.data) // wanted][1] for i in range(wanted)])  # from all classes
        write_grid(run, "reconstructions", run.data.latent_format.sample(moments.to(run.accelerator.device), None))


def draw_latents(run: Run, network: SiT, numbers: range, num_steps: int, guidance: Guidance) -> Tensor:
    """Return the EMA network's latents (N, C, h, w) of images given by number, each class as often as any other."""
    latents, _ = sample_images(
        network,
        labels=[number % network.num_classes for number in numbers],
        seeds=[derive_seed(run.args.seed, number) for number in numbers],
        interpolant=run.criterion.interpolant,
        guidance=guidance,
        num_steps=num_steps,
    )
    return latents


def write_grid(run: Run, name: str, latents: Tensor) -> None:
    """Decode latents and write them as samples/NAME.png; to the tracker as well."""
    grid = image_grid(run.codec.decode(latents.float()).permute(0, 2, 3, 1).cpu().numpy())
    path = run.folder / "samples" / f"{name}.png"
    with going_on_despite(str(path)):
        save_png(path, grid)
    for tracker in run.accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            tracker.log({"samples": wandb.Image(grid)}, step=run.step)
        elif tracker.name == "tensorboard":
            tracker.writer.add_image("samples", np.asarray(grid), run.step, dataformats="HWC")
