"""The forms of a training step that train_step.py compares: a plain one and train.py's own.

All forms of a workload share network, averaged network, encoders, batches and the random numbers of each step. From the
same weights their losses are therefore equal, up to rounding.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import Tensor, nn

import train
from benchmarks.timing import count_flops, timed
from common.images import save_png
from common.io import write_json
from common.locks import unlock_folder
from common.sources import image_name, latents_name
from loss import Draws, REGLoss, Targets, alignment
from models.autoencoder import SD_FORMAT
from models.encoders import untrained_encoder
from training.checkpoint_writer import CheckpointWriter
from training.config import parse_args
from training.messages import logger
from training.parallelism import compile_training, to_device
from training.setup import set_up
from training.state import Run, new_network
from training.throughput import training_flops

NUM_CLASSES = 1000
SAVES = 3  # checkpoints that are timed
Batch = tuple[Tensor, Tensor, Tensor]


class Workload:
    """A training run on synthetic data, and what its forms share.

    Args:
        flags: flags of train.py that say what is trained, such as `--model SiT-B/2 --batch-size 8`.
        encoder: value of --enc-type.
        resolution: of the images, px.
        batches: number of different batches. They are repeated in a cycle.
        encoder_weights: value of --enc-weights; None: random weights.
        depth: number of blocks; None: the preset's.
    """

    def __init__(
        self,
        flags: Sequence[str],
        encoder: str,
        resolution: int,
        batches: int = 1,
        encoder_weights: str | None = None,
        depth: int | None = None,
    ):
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier workload had its own precision
        GradientState._reset_state()
        with tempfile.TemporaryDirectory() as folder:
            data = write_data_set(Path(folder) / "data", resolution)
            weights = encoder_weights
            if encoder != "none" and not weights:
                weights = write_random_weights(Path(folder), encoder, resolution)
            settings = ["--exp-name", "benchmark", "--output-dir", folder, "--data-dir", str(data)]
            settings += f"--num-classes {NUM_CLASSES} --sampling-steps 0 --no-check-data".split()
            settings += ["--enc-type", encoder, *(["--enc-weights", weights] if weights else [])]
            settings += ["--depth", str(depth), "--encoder-depth", "1"] if depth else []
            self.run = set_up(parse_args([*settings, *flags]))
            logger.setLevel("WARNING")  # no line for each checkpoint that a benchmark writes
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
        for optimizer in self.optimizers.values():  # zeroed, not freed: the memory stays that of all forms together
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()
        if self.scaler:
            self.scaler.load_state_dict(self.scaler_start)

    def flops(self) -> dict[str, int]:
        """Return the floating-point operations of one image, counted by torch, for the network and the encoders."""
        with torch.device("meta"):
            network = new_network(self.run.config, self.run.facts)
        images = self.pool[0][0][:1].to("meta")
        encoders = [copy.deepcopy(encoder).to("meta") for encoder in self.run.encoders]
        encoder_flops = count_flops(lambda: [encoder(images) for encoder in encoders])
        return {"network": training_flops(network), "encoders": encoder_flops}

    def optimizer_bytes(self, fused: bool) -> int:
        """Return the memory of one optimizer's state."""
        states = self.optimizers[fused].state.values()
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))


class Form:
    """One way to take training steps on a workload.

    Attributes:
        fused: which of the workload's optimizers the form uses.
        compiled: whether the first steps compile the network.
        run: the run with the form's own step number.
    """

    fused: bool
    compiled = False

    def __init__(self, name: str, work: Workload, run: Run):
        self.name, self.work, self.run = name, work, run
        self.losses: list[float] = []

    def finish(self) -> list[float]:
        """Return the losses since the last call. Waits for the device."""
        losses, self.losses = self.losses, []
        return losses


class OurForm(Form):
    """train.py's own step."""

    fused = True

    def __init__(self, work: Workload, compiled: bool = False, checkpointing: bool = False, backend: str = "inductor"):
        network, encoders = work.twin(work.network), [work.twin(encoder) for encoder in work.run.encoders]
        criterion, reports = copy.copy(work.run.criterion), copy.deepcopy(work.run.reports)
        network.activation_checkpointing = checkpointing
        if compiled:
            compile_training(network, encoders, criterion, backend)
        model = work.run.accelerator.prepare(network)
        run = replace(work.run, model=model, encoders=encoders, criterion=criterion, reports=reports)
        name = "train.py" + " --compile" * compiled + " --activation-checkpointing" * checkpointing
        super().__init__(name, work, run)
        self.compiled = compiled
        pin = work.device.type == "cuda"
        pool = [tuple(tensor.pin_memory() for tensor in batch) for batch in work.pool] if pin else work.pool
        self.batches: Iterator[Batch] = to_device(itertools.cycle(pool), work.device)

    def step(self) -> None:
        """Take one step."""
        train.training_step(self.run, self.batches)
        self.run.step += 1
        self._read(wait_for_all=False)

    def finish(self) -> list[float]:
        self._read(wait_for_all=True)
        return super().finish()

    def _read(self, wait_for_all: bool) -> None:
        self.losses += [report.means["loss"] for report in self.run.reports.receive(wait_for_all)]


class PlainForm(Form):
    """A straightforward step of the same method, with autocast and fused attention.

    It computes the alignment in a loop over samples and encoders, uses torch's default AdamW, averages the weights
    tensor by tensor, copies each batch when it is needed, and reads the loss terms in every step.
    """

    fused = False

    def __init__(self, work: Workload, precision: str | None = None):
        """Make the form. `precision`: as --mixed-precision, instead of the run's."""
        configured = work.run.config.precision
        precision = precision or configured
        super().__init__("plain" + f", precision {precision}" * (precision != configured), work, replace(work.run))
        self.batches = itertools.cycle(work.pool)
        self.dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.optimizer = work.optimizers[self.fused]
        self.scaler = torch.amp.GradScaler(work.device.type, enabled=precision == "fp16")

    def step(self) -> None:
        """Take one step."""
        run, network, device = self.run, self.work.network, self.work.device
        with run.log.clock.waiting_for_data():
            images, moments, y = (tensor.to(device) for tensor in next(self.batches))
        draws = run.randomness.draw(run.step)
        x = run.facts.latent_format.sample(moments, draws.latent_noise)

        # Forward and backward pass
        with torch.autocast(device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            targets = train.encode_tokens(run, [images], x)
            terms = looped_loss(run.criterion, network, x, y, targets, draws)
        self.scaler.scale(terms["loss"].mean()).backward()

        # Update of weights and averaged weights
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(network.parameters(), run.config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        looped_ema(run.ema, network, run.config.ema_decay)

        # Log
        values = [value.item() for value in (*(term.mean() for term in terms.values()), grad_norm)]
        self.losses.append(values[0])
        run.log.clock.end_step()
        run.step += 1


def measure_saves(form: OurForm, folder: Path) -> dict[str, float | None]:
    """Return medians in seconds: of the stall of a save, of writing in the background, and of a step meanwhile.

    The last one is None if writing takes less time than a step.
    """
    device, stalls, writes, during = form.work.device, [], [], []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        writer = CheckpointWriter(Path(place), keep_last=1)
        form.run = replace(form.run, writer=writer)
        train.save(form.run)  # allocates memory, not timed
        for _ in range(SAVES):
            writer.finish()
            form.step()
            start = time.perf_counter()
            stalls.append(timed(partial(train.save, form.run), device))
            while writer.busy:
                during.append(timed(form.step, device))
            writes.append(time.perf_counter() - start)
        writer.finish()
        gigabytes = next(Path(place).glob("*.pt")).stat().st_size / 1e9
    step = statistics.median(during) if during else None
    return {"stall": statistics.median(stalls), "write": statistics.median(writes), "step": step, "gb": gigabytes}


def looped_loss(
    criterion: REGLoss, network: nn.Module, x: Tensor, y: Tensor, targets: Targets, draws: Draws
) -> dict[str, Tensor]:
    """Return what `criterion` returns, with the alignment computed sample by sample."""
    x_t, cls_t = criterion.mix(x, targets, draws)
    tokens = targets.encoder_tokens
    output = network(x_t, draws.t, y, cls_token=cls_t, label_drop=draws.label_drop, project=bool(tokens))
    terms = criterion.compare(*output, x, targets._replace(encoder_tokens=()), draws)
    if tokens:
        pairs = zip(zip(*output.projected, strict=True), zip(*tokens, strict=True), strict=True)  # one per sample
        aligned = [alignment([a[None] for a in ours], [b[None] for b in theirs]) for ours, theirs in pairs]
        terms["proj"] = torch.cat(aligned)
        terms["loss"] = terms["loss"] + criterion.weights["proj"] * terms["proj"]
    return terms


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
