"""The forms of a training step that benchmarks compare: a plain one, the same with optimisations, and train.py's own.

All forms of a workload share network, averaged network, encoders, batches and the random numbers of each step. From the
same weights their losses are therefore equal, up to rounding.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import Tensor, nn

import train
from benchmarks.timing import DeviceBenchmark, count_flops
from common.cli import setting
from common.images import save_png
from common.io import unlock_folder, write_json
from common.sources import image_name, latents_name
from loss import Draws, REGLoss, Targets
from models import ema
from models.autoencoder import SD_FORMAT
from models.encoders import untrained_encoder
from training.config import parse_args
from training.parallelism import compile_training, to_device
from training.setup import set_up
from training.state import Run, new_network
from training.throughput import training_flops

NUM_CLASSES = 1000
OPTIMISATIONS = {  # of the plain form, in the order in which they are added
    "loss": "batched loss",
    "adamw": "fused AdamW",
    "ema": "foreach EMA",
    "log": "no waiting for the log",
    "copies": "pinned memory, side stream",
}
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainingBenchmark(DeviceBenchmark):
    """Device, encoder weights and results."""

    enc_weights: str | None = setting(None, "weights of the encoder; default: random weights")
    backend: str = setting("inductor", "backend of torch.compile")


class Workload:
    """A training run on synthetic data, and what its forms share.

    Args:
        flags: flags of train.py that say what is trained, such as `--model SiT-B/2 --batch-size 8`.
        encoder: value of --enc-type.
        resolution: of the images, px.
        batches: number of different batches. They are repeated in a cycle.
        encoder_weights: value of --enc-weights; None: random weights.
        depth: number of blocks; None: the preset's.
        folder: where the run's folder is made. Default: a temporary folder, which is removed after the set-up.
    """

    def __init__(
        self,
        flags: Sequence[str],
        encoder: str,
        resolution: int,
        batches: int = 1,
        encoder_weights: str | None = None,
        depth: int | None = None,
        folder: Path | None = None,
    ):
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier workload had its own precision
        GradientState._reset_state()
        with contextlib.nullcontext(folder) if folder else tempfile.TemporaryDirectory() as place:
            data = write_data_set(Path(place) / "data", resolution)
            weights = encoder_weights
            if encoder != "none" and not weights:
                weights = write_random_weights(Path(place), encoder, resolution)
            settings = ["--exp-name", "benchmark", "--output-dir", str(place), "--data-dir", str(data)]
            settings += f"--num-classes {NUM_CLASSES} --sampling-steps 0 --no-check-data --keep-last 1".split()
            settings += ["--enc-type", encoder, *(["--enc-weights", weights] if weights else [])]
            settings += ["--depth", str(depth), "--encoder-depth", "1"] if depth else []
            self.run = set_up(parse_args([*settings, *flags]))
            unlock_folder(self.run.folder)
        self.device = self.run.accelerator.device
        # Without accelerate's autocast, so that each form can have its own precision.
        self.network = self.run.accelerator.unwrap_model(self.run.model, keep_fp32_wrapper=False)
        self.start = [parameter.detach().cpu().clone() for parameter in self.network.parameters()]
        config = self.run.config
        parameters = self.network.parameters()
        default = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.adam_weight_decay)
        self.optimizers = {False: default, True: self.run.optimizer.optimizer.optimizer}  # by whether they are fused
        self.scaler = self.run.accelerator.scaler
        self.scaler_start = self.scaler and self.scaler.state_dict()
        self.pool = [synthetic_batch(config.batch_size, resolution, number) for number in range(batches)]

    def batches(self, pinned: bool) -> Iterator[Batch]:
        """Return an endless iterator over the batches, in host memory."""
        pin = pinned and self.device.type == "cuda"
        pool = [tuple(tensor.pin_memory() for tensor in batch) for batch in self.pool] if pin else self.pool
        return itertools.cycle(pool)

    def twin(self, module: nn.Module) -> nn.Module:
        """Return a copy of a module that shares its parameters, and can be compiled or wrapped separately."""
        shared = itertools.chain(module.parameters(), module.buffers())
        return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})

    def reset(self) -> None:
        """Set weights, averaged weights and optimizers back to their start."""
        with torch.no_grad():
            for network in (self.network, self.run.ema):
                for parameter, start in zip(network.parameters(), self.start, strict=True):
                    parameter.copy_(start)
                    parameter.grad = None
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        if self.scaler:
            self.scaler.load_state_dict(self.scaler_start)

    def flops(self) -> dict[str, int]:
        """Return the floating-point operations of one image, counted by torch, for the network and the encoders."""
        with torch.device("meta"):
            network = new_network(self.run.config, self.run.facts)
        images = self.pool[0][0][:1].to("meta")
        encoders = [copy.deepcopy(encoder).to("meta") for encoder in self.run.encoders]
        return {
            "network": training_flops(network),
            "encoders": count_flops(lambda: [encoder(images) for encoder in encoders]),
        }

    def optimizer_bytes(self, fused: bool) -> int:
        """Return the memory of one optimizer's state."""
        states = self.optimizers[fused].state.values()
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))


class Form:
    """One way to take training steps on a workload.

    Attributes:
        run: the run with the form's own step number.
        fused: which of the workload's optimizers the form uses.
    """

    def __init__(self, name: str, work: Workload, run: Run, fused: bool, copies: bool):
        self.name, self.work, self.run, self.fused = name, work, run, fused
        self.batches = work.batches(pinned=copies)
        if copies:
            self.batches = to_device(self.batches, work.device)
        self.losses: list[float | Tensor] = []

    def restart(self) -> None:
        """Start again at step 0."""
        self.run.step = 0

    def finish(self) -> list[float]:
        """Return the losses since the last call. Waits for the device."""
        losses, self.losses = self.losses, []
        return [float(loss) for loss in losses]


class OurForm(Form):
    """train.py's own step."""

    def __init__(self, work: Workload, compiled: bool = False, checkpointing: bool = False, backend: str = "inductor"):
        network, encoders = work.twin(work.network), [work.twin(encoder) for encoder in work.run.encoders]
        criterion, reports = copy.copy(work.run.criterion), copy.deepcopy(work.run.reports)
        network.activation_checkpointing = checkpointing
        if compiled:
            compile_training(network, encoders, criterion, backend)
        model = work.run.accelerator.prepare(network)
        run = replace(work.run, model=model, encoders=encoders, criterion=criterion, reports=reports)
        name = "train.py" + " --compile" * compiled + " --activation-checkpointing" * checkpointing
        super().__init__(name, work, run, fused=True, copies=True)

    def step(self) -> None:
        """Take one step."""
        train.training_step(self.run, self.batches)
        self.run.step += 1
        self._read(wait_for_all=False)

    def finish(self) -> list[float]:
        """Return the losses since the last call. Waits for the device."""
        self._read(wait_for_all=True)
        return super().finish()

    def _read(self, wait_for_all: bool) -> None:
        self.losses += [report.means["loss"] for report in self.run.reports.receive(wait_for_all)]


class PlainForm(Form):
    """A straightforward step with those of `OPTIMISATIONS` that are given: the same method at another speed.

    It uses autocast and fused attention. Without optimisations it computes the alignment in a loop over samples and
    encoders, uses torch's default AdamW, averages tensor by tensor, copies each batch when it is needed, and reads the
    loss terms in every step.
    """

    def __init__(self, work: Workload, optimisations: Sequence[str] = (), precision: str | None = None):
        name = f"+ {OPTIMISATIONS[optimisations[-1]]}" if optimisations else "plain"
        precision = precision or work.run.config.precision
        if precision != work.run.config.precision:
            name += f", precision {precision}"
        super().__init__(name, work, replace(work.run), "adamw" in optimisations, "copies" in optimisations)
        self.optimisations = optimisations
        self.dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.optimizer = work.optimizers[self.fused]
        self.scaler = torch.amp.GradScaler(work.device.type, enabled=precision == "fp16")

    def step(self) -> None:
        """Take one step."""
        run, network, device = self.run, self.work.network, self.work.device
        with run.log.waiting_for_data():
            images, moments, y = (tensor.to(device) for tensor in next(self.batches))
        draws = run.randomness.draw(run.step)
        x = run.facts.latent_format.sample(moments, draws.latent_noise)

        # Forward and backward pass
        criterion = run.criterion if "loss" in self.optimisations else partial(looped_loss, run.criterion)
        with torch.autocast(device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            terms = criterion(network, x, y, train.encode_tokens(run, images, x), draws)
        self.scaler.scale(terms["loss"].mean()).backward()

        # Update of weights and averaged weights
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(network.parameters(), run.config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        update_average = ema.update if "ema" in self.optimisations else looped_ema
        update_average(run.ema, network, run.config.ema_decay)

        # Log
        values = [*(term.mean().detach() for term in terms.values()), grad_norm]
        self.losses.append((torch.stack(values) if "log" in self.optimisations else [v.item() for v in values])[0])
        run.step += 1


def looped_loss(
    criterion: REGLoss, network: nn.Module, x: Tensor, y: Tensor, targets: Targets, draws: Draws
) -> dict[str, Tensor]:
    """Return what `criterion` returns, with the alignment computed sample by sample."""
    path, cls_token, encoder_tokens = criterion.path, *targets
    x_t = path.interpolate(x, draws.noise, draws.t)
    cls_t = None if cls_token is None else path.interpolate(cls_token, draws.cls_noise, draws.t)
    v, projected, v_cls = network(x_t, draws.t, y, cls_t, draws.label_drop, project=bool(encoder_tokens))
    terms = {"denoise": ((v - path.velocity_target(x, draws.noise, draws.t)) ** 2).flatten(1).mean(dim=1)}
    if encoder_tokens:
        proj = torch.zeros((), device=x.device)
        for ours, theirs in zip(projected, encoder_tokens, strict=True):
            for our, their in zip(ours, theirs, strict=True):
                our, their = F.normalize(our.float(), dim=-1), F.normalize(their, dim=-1)
                proj = proj - (our * their).sum(dim=-1).mean()
        terms["proj"] = (proj / (len(encoder_tokens) * len(x))).expand(len(x))
    if cls_token is not None:
        terms["cls"] = ((v_cls - path.velocity_target(cls_token, draws.cls_noise, draws.t)) ** 2).mean(dim=1)
    weights = {"denoise": 1.0, **criterion.weights}
    return {"loss": sum(weights[name] * value for name, value in terms.items()), **terms}


@torch.no_grad()
def looped_ema(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move each averaged tensor towards the network's, one after the other."""
    weights = dict(network.named_parameters())
    for name, value in average.named_parameters():
        value.mul_(decay).add_(weights[name], alpha=1 - decay)


def synthetic_batch(batch_size: int, resolution: int, number: int) -> Batch:
    """Return images, moments and labels as the loader does. The patterns are smooth, so that a network can learn."""
    generator = torch.Generator().manual_seed(number)
    coarse = torch.randn(batch_size, 7, 4, 4, generator=generator)
    images = F.interpolate(coarse[:, :3], (resolution, resolution), mode="bilinear").mul(64).add(128).clamp(0, 255)
    mean = F.interpolate(coarse[:, 3:], (resolution // 8, resolution // 8), mode="bicubic") / SD_FORMAT.scale
    labels = torch.randint(NUM_CLASSES, (batch_size,), generator=generator)
    return images.to(torch.uint8), torch.cat([mean, torch.full_like(mean, 0.5)], dim=1), labels


def write_data_set(folder: Path, resolution: int) -> Path:
    """Write a data set of one image and return its folder: the set-up of a run reads all sizes from it."""
    images, moments, _ = synthetic_batch(1, resolution, 0)
    save_png(folder / "images" / image_name(0), Image.fromarray(images[0].permute(1, 2, 0).numpy()))
    write_json(folder / "images" / "dataset.json", {"labels": [[image_name(0), 0]]})
    codec = SD_FORMAT.to_json()
    write_json(folder / "vae-sd" / "dataset.json", {"labels": [[latents_name(0), 0]], "codec": codec})
    (folder / "vae-sd" / latents_name(0)).parent.mkdir()
    np.save(folder / "vae-sd" / latents_name(0), moments[0].numpy())
    return folder


def write_random_weights(folder: Path, encoder: str, resolution: int) -> str:
    """Write random weights for --enc-type `encoder`; return the value of --enc-weights."""
    torch.manual_seed(0)
    paths = []
    for number, spec in enumerate(encoder.split(",")):
        paths.append(str(folder / f"encoder{number}.pt"))
        torch.save(untrained_encoder(spec, resolution).network.state_dict(), paths[-1])
    return ",".join(paths)
