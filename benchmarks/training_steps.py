"""The forms of one training step that benchmarks compare: plain, with one switch after the other, and train.py's own.

All forms of a workload share weights, average, encoders, batches and the noise of each step, so that from the same
weights they have the same losses, up to rounding, and differ in how they get there.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import train
from loss import LossTerms, REGLoss
from models import ema
from models.autoencoder import SD_FORMAT
from models.encoders import load_encoders, untrained_encoder
from models.interpolant import Interpolant
from training.config import parse_args
from training.metrics import RunLog, StepReport, StepReports
from training.parallelism import compile_training, to_device
from training.preemption import StopSignal
from training.setup import Run, describe_run, make_accelerator
from training.state import build_network
from training.throughput import training_flops

NUM_CLASSES = 1000
SWITCHES = {  # what each adds to the plain form
    "loss": "batched loss",
    "adamw": "fused AdamW",
    "ema": "foreach EMA",
    "log": "no waiting for the log",
    "copies": "pinned memory, side stream",
}
Batch = tuple[Tensor, Tensor, Tensor]


class Workload:
    """What the forms share.

    Args:
        flags: train.py's flags that say what is trained, `--model SiT-B/2 --batch-size 8` and so on.
        resolution: of the images, px.
        batches: so many different batches, which come round again and again.
        encoder_weights: files as for --enc-weights; None: random weights.
    """

    def __init__(self, flags: list[str], resolution: int, batches: int = 1, encoder_weights: str | None = None):
        self.args = args = parse_args(["--exp-name", "benchmark", *flags])
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier workload's precision
        GradientState._reset_state()
        self.accelerator = make_accelerator(args)
        self.device = self.accelerator.device
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
        size = resolution // SD_FORMAT.factor
        self.data = SimpleNamespace(
            latent_format=SD_FORMAT, latent_size=size, resolution=resolution, num_classes=NUM_CLASSES
        )
        self.encoders = []
        torch.manual_seed(args.seed)  # untrained encoders are the same ones each time
        if args.enc_type != "none":
            tokens = (size // int(args.model.rsplit("/")[1])) ** 2
            self.encoders = (
                load_encoders(args.enc_type, resolution, encoder_weights, tokens, self.device)
                if encoder_weights
                else [untrained_encoder(spec, resolution, self.device) for spec in args.enc_type.split(",")]
            )
        describe_run(args, self.data, self.encoders)
        self.network = build_network(args).to(self.device).train()
        self.average = ema.averaged_copy(self.network)
        self.start = [parameter.detach().cpu().clone() for parameter in self.network.parameters()]
        recipe = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
        self.optimizers = {
            fused: torch.optim.AdamW(self.network.parameters(), fused=fused or None, **recipe)
            for fused in (False, True)
        }
        self.prepared_optimizer = self.accelerator.prepare(self.optimizers[True])
        self.scaler_start = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        self.pool = [synthetic_batch(args.batch_size, resolution, number) for number in range(batches)]

    def batches(self, pinned: bool) -> Iterator[Batch]:
        """Return the batches without end, in the host's memory."""
        pin = pinned and self.device.type == "cuda"
        pool = [tuple(tensor.pin_memory() for tensor in batch) for batch in self.pool] if pin else self.pool
        return itertools.cycle(pool)

    def twin(self, module: nn.Module) -> nn.Module:
        """Return another module with the same parameters, to be compiled or wrapped apart from the first."""
        shared = itertools.chain(module.parameters(), module.buffers())
        return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})

    def reset(self) -> None:
        """Put weights, average and optimisers back to the start."""
        with torch.no_grad():
            for parameter, start in zip(self.network.parameters(), self.start, strict=True):
                parameter.copy_(start)
                parameter.grad = None
            for average, start in zip(self.average.parameters(), self.start, strict=True):
                average.copy_(start)
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.scaler_start)

    def flops(self) -> dict[str, int]:
        """Return the floating-point operations of one image, as torch's counter finds them: network, encoders."""
        with torch.device("meta"):
            network = build_network(self.args)
        images = torch.empty(1, 3, self.data.resolution, self.data.resolution, dtype=torch.uint8, device="meta")
        with FlopCounterMode(display=False) as counter:
            for encoder in self.encoders:
                copy.deepcopy(encoder).to("meta")(images)
        return {"network": training_flops(network), "encoders": counter.get_total_flops()}

    def optimizer_bytes(self, fused: bool) -> int:
        """Return the memory that one optimiser's state takes."""
        states = self.optimizers[fused].state.values()
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))


class OurForm:
    """train.py's own step, on a workload's weights and batches."""

    fused = True

    def __init__(self, work: Workload, compiled: bool = False, checkpointing: bool = False, backend: str = "inductor"):
        self.name = "train.py" + " --compile" * compiled + " --activation-checkpointing" * checkpointing
        self.work = work
        network, encoders = work.twin(work.network), [work.twin(encoder) for encoder in work.encoders]
        network.activation_checkpointing = checkpointing
        args, accelerator = work.args, work.accelerator
        criterion = REGLoss(Interpolant(args.path_type), args.proj_coeff, args.cls, args.weighting)
        if compiled:
            compile_training(network, encoders, criterion, backend)
        log = ListLog(args.batch_size)
        self.run = Run(
            args=args, folder=Path("."), accelerator=accelerator, data=work.data, encoders=encoders, codec=None,
            evaluation=None, model=accelerator.prepare(network), ema=work.average, optimizer=work.prepared_optimizer,
            criterion=criterion, log=log, step=0,
            reports=StepReports(lambda values: accelerator.reduce(values, "mean"), work.device, ("stop", "save")),
            bad_steps=ListedBadSteps(log),
            writer=SimpleNamespace(failure=None), stop_signal=StopSignal(),
        )  # fmt: skip
        self.log = log
        self.source = to_device(work.batches(pinned=True), work.device)

    def step(self) -> None:
        """Take one step."""
        train.training_step(self.run, self.source)
        self.run.step += 1
        train.read_reports(self.run)

    def restart(self) -> None:
        """Begin anew with step 0."""
        self.run.step = 0

    def finish(self) -> list[float]:
        """Return the losses since the last call, waiting for what has not arrived."""
        train.read_reports(self.run, all_sent=True)
        return self.log.take_losses()


class PlainForm:
    """A step as one writes it at first, with those of `SWITCHES` that are on: the same method, another speed.

    Autocast and fused attention as everywhere; a loop over samples and encoders in the alignment, torch's default
    AdamW, an average tensor by tensor, batches copied where they are needed, numbers read in each step.
    """

    def __init__(self, work: Workload, switches: tuple[str, ...] = (), precision: str | None = None):
        self.name = f"+ {SWITCHES[switches[-1]]}" if switches else "plain"
        precision = precision or work.args.mixed_precision
        if precision != work.args.mixed_precision:
            self.name += f", precision {precision}"
        self.work, self.on = work, switches
        self.dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.fused = "adamw" in switches
        self.optimizer = work.optimizers[self.fused]
        self.scaler = torch.amp.GradScaler(work.device.type, enabled=precision == "fp16")
        self.criterion = REGLoss(Interpolant(work.args.path_type), work.args.proj_coeff, work.args.cls)
        self.log = ListLog(work.args.batch_size)
        self.unread: list[Tensor] = []
        batches = work.batches(pinned="copies" in switches)
        self.source = to_device(batches, work.device) if "copies" in switches else batches
        self.restart()

    def restart(self) -> None:
        """Begin anew with step 0."""
        self.number = 0

    def step(self) -> None:
        """Take one step."""
        work, args, network, device = self.work, self.work.args, self.work.network, self.work.device
        with self.log.waiting_for_data():
            images, moments, y = (tensor.to(device) for tensor in next(self.source))
        # The noise that train.py draws in this step.
        noise = train.step_noise(
            SimpleNamespace(
                args=args, ema=work.average, accelerator=work.accelerator, criterion=self.criterion, step=self.number
            )
        )
        x = SD_FORMAT.sample(moments, noise.latent_noise)
        with torch.autocast(device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            cls_token, targets = train.encode(work.encoders, images, x, args.entangle, args.proj_coeff > 0)
            given = (x, y, cls_token, targets, noise.t, noise.noise, noise.cls_noise, noise.label_drop)
            terms = (
                self.criterion(network, *given) if "loss" in self.on else looped_loss(self.criterion, network, *given)
            )
            loss = terms.total.mean()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if "ema" in self.on:
            ema.update(work.average, network, args.ema_decay)
        else:
            loop_ema(work.average, network, args.ema_decay)
        values = [term.mean().detach() for term in terms.named().values()] + [grad_norm]
        if "log" in self.on:
            self.unread.append(torch.stack(values))
        else:
            read = [value.item() for value in values]
            self.log.add({"loss": read[0]})
        self.number += 1

    def finish(self) -> list[float]:
        """Return the losses since the last call, waiting for what has not arrived."""
        if self.unread:
            for loss in torch.stack(self.unread)[:, 0].tolist():
                self.log.add({"loss": loss})
            self.unread = []
        return self.log.take_losses()


class ListLog(RunLog):
    """A run's log that writes nothing and keeps each loss."""

    def __init__(self, batch_size: int):
        super().__init__(Path("."), batch_size, False, lambda row, step: None)
        self.losses: list[float] = []

    def add(self, means: dict[str, float]) -> None:
        self.losses.append(means["loss"])

    def take_losses(self) -> list[float]:
        """Return the losses added since the last call."""
        taken, self.losses = self.losses, []
        return taken


class ListedBadSteps:
    """Takes note of steps that do not count by their losses alone, as the plain form does."""

    def __init__(self, log: ListLog):
        self.log = log

    def note(self, report: StepReport) -> None:
        """Log the loss, where training leaves it out."""
        if not report.good:
            self.log.add(report.means)


def looped_loss(criterion: REGLoss, network: nn.Module, x: Tensor, y: Tensor, cls_token: Tensor | None,
                targets: list[Tensor], t: Tensor, noise: Tensor, cls_noise: Tensor | None, label_drop: Tensor,
                ) -> LossTerms:  # fmt: skip
    """Return what `criterion` returns, the alignment computed sample by sample, each on its own."""
    path = criterion.interpolant
    x_t = path.interpolate(x, noise, t)
    cls_t = None if cls_token is None else path.interpolate(cls_token, cls_noise, t)
    velocity, projected, cls_velocity = network(x_t, t, y, cls_t, label_drop, project=bool(targets))
    total = denoise = ((velocity - path.velocity_target(x, noise, t)) ** 2).flatten(1).mean(dim=1)
    proj = cls = None
    if targets:
        proj = torch.zeros((), device=x.device)
        for ours, theirs in zip(projected, targets, strict=True):
            for our, their in zip(ours, theirs, strict=True):
                our, their = F.normalize(our.float(), dim=-1), F.normalize(their, dim=-1)
                proj = proj - (our * their).sum(dim=-1).mean()
        proj = (proj / (len(targets) * len(x))).expand(len(x))
        total = total + criterion.proj_coeff * proj
    if cls_token is not None:
        cls = ((cls_velocity - path.velocity_target(cls_token, cls_noise, t)) ** 2).mean(dim=1)
        total = total + criterion.cls_coeff * cls
    return LossTerms(denoise, proj, cls, total)


@torch.no_grad()
def loop_ema(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move each averaged tensor towards the network's, one after the other."""
    weights = dict(network.named_parameters())
    for name, value in average.named_parameters():
        value.mul_(decay).add_(weights[name], alpha=1 - decay)


def synthetic_batch(batch_size: int, resolution: int, number: int) -> Batch:
    """Return images, moments and labels as the loader does: smooth patterns, so that there is something to learn."""
    generator = torch.Generator().manual_seed(number)
    coarse = torch.randn(batch_size, 7, 4, 4, generator=generator)
    images = F.interpolate(coarse[:, :3], (resolution, resolution), mode="bilinear").mul(64).add(128).clamp(0, 255)
    mean = F.interpolate(coarse[:, 3:], (resolution // 8, resolution // 8), mode="bicubic") / SD_FORMAT.scale
    labels = torch.randint(NUM_CLASSES, (batch_size,), generator=generator)
    return images.to(torch.uint8), torch.cat([mean, torch.full_like(mean, 0.5)], dim=1), labels
