"""The state of a training run: network, averaged network, optimizer; new, from given weights, or from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from common.errors import InputError
from dataset import LatentDataset
from evaluations.in_training import TrainingEvaluation
from loss import REGLoss
from models import ema
from models.autoencoder import Codec
from models.checkpoint import load_checkpoint, network_weights, resolve_checkpoint, saved_settings, steps_done
from models.encoders import Encoder
from models.inference import NETWORK_DTYPES
from models.sit import SiT
from models.switches import switches_of_weights
from models.tensor_checks import check_finite
from models.weights_file import mismatch
from training.checkpoint_writer import CheckpointWriter
from training.config import RunFacts, TrainConfig
from training.guards import BadSteps, FiniteWeights, GuardedOptimizer
from training.messages import logger
from training.metrics import RunLog, StepReports
from training.optimizers import MuonWithAdamW, make_optimizer
from training.parallelism import device_mesh, shard, shard_like
from training.preemption import StopSignal
from training.randomness import StepRandomness
from training.record import DamagedError
from training.restore import check_optimizer_settings, check_scaler, optimizer_groups, optimizer_state, parameters_of

CLASS_SLOT = ("cls_projectors2.", "wg_norm.", "final_layer.linear_cls.")  # the layers that read or return class tokens


@dataclass
class Run:
    """One training run: `training.setup.set_up` builds it, `train.train` advances it."""

    config: TrainConfig
    facts: RunFacts
    accelerator: Accelerator
    data: LatentDataset
    encoders: list[Encoder]
    codec: Codec | None  # decodes samples; None if no samples are wanted
    evaluation: TrainingEvaluation | None
    model: torch.nn.Module
    ema: SiT
    optimizer: GuardedOptimizer
    criterion: REGLoss
    randomness: StepRandomness
    log: RunLog
    step: int  # optimizer steps done
    reports: StepReports
    bad_steps: BadSteps
    weights: FiniteWeights
    writer: CheckpointWriter
    stop_signal: StopSignal
    requests: set[str] = field(default_factory=set)  # what any process asked all processes for: `setup.REQUESTS`
    lost_worker: str | None = None  # why a loader process of the run has ended
    retry_save_at: int = 0  # step from which a failed checkpoint is tried again
    resumed_from: Path | None = None  # the checkpoint; None: a new run
    class_centres: Tensor | None = None  # mean token of each class, computed by the first evaluation

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.config.folder

    @property
    def aligns(self) -> bool:
        """Whether the next step has the alignment term."""
        return bool(self.facts.network.z_dims) and not alignment_ended(self.config, self.step)


def alignment_ended(config: TrainConfig, steps: int) -> bool:
    """Return whether --align-stop-steps has switched the alignment off after a number of steps."""
    return 0 < config.align_stop_steps <= steps


def new_network(config: TrainConfig, facts: RunFacts) -> SiT:
    """Return the network of a run with the initial weights of its seed."""
    torch.manual_seed(config.seed)
    model = SiT(facts.network, fused_attn=config.fused_attn)
    if facts.cls_statistics is not None:
        model.cls_scale.load_state_dict(facts.cls_statistics._asdict())
    return model


def prepare_networks(
    config: TrainConfig, facts: RunFacts, accelerator: Accelerator, checkpoint: dict[str, Any] | None,
    path: Path | None,
) -> tuple[torch.nn.Module, SiT, AcceleratedOptimizer]:  # fmt: skip
    """Return network, averaged network and optimizer on the devices of the processes, new or from a checkpoint.

    `path` of the checkpoint is for errors. Raises InputError if it does not fit.
    """
    # Weights.
    model = new_network(config, facts)
    average = ema.averaged_copy(model)
    model.activation_checkpointing = config.activation_checkpointing
    if checkpoint is not None:
        restore_weights(checkpoint, model, average, path)
    elif config.init_from:
        initial = initialize_from(config.init_from, model, average)
        logger.info(
            "weights of %s; newly initialized: %s", resolve_checkpoint(config.init_from), ", ".join(initial) or "none"
        )

    # Devices.
    if config.fsdp:
        mesh = device_mesh(accelerator)
        shard(model, mesh, None if config.precision == "no" else NETWORK_DTYPES[config.precision])
        shard(average, mesh)
    else:
        model, average = model.to(accelerator.device), average.to(accelerator.device)

    # Optimizer and loss scaler.
    optimizer = make_optimizer(model, config)
    if checkpoint is not None:
        restore_optimizer(checkpoint, optimizer, model, alignment_ended(config, checkpoint["steps"]))
    if not config.fsdp:
        model = accelerator.prepare(model)
    optimizer = accelerator.prepare(optimizer)
    if checkpoint is not None:
        scaler = accelerator.scaler
        check_scaler(checkpoint.get("scaler"), None if scaler is None else scaler.state_dict())
        if scaler is not None and checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
    return model, average, optimizer


def restore_weights(checkpoint: dict[str, Any], model: SiT, average: SiT, path: Path) -> None:
    """Load weights and averaged weights, strictly. Raises InputError if they do not fit or are not finite."""
    try:
        for part, network in (("model", model), ("ema", average)):
            network.load_state_dict(network_weights(checkpoint, part, path))
            check_finite(network.state_dict(), f"{path}: {part}")
            if network.cls_scale is not None:
                network.cls_scale.check(f"{path}: {part}")
    except RuntimeError as error:
        raise DamagedError(f"its weights do not fit the network of the flags; {mismatch(error)}") from error


def restore_optimizer(
    checkpoint: dict[str, Any], optimizer: torch.optim.Optimizer, model: SiT, alignment_has_ended: bool = False
) -> None:
    """Load the optimizer state, compared with what it must be. Its settings are those of the flags.

    After the end of the alignment, the projectors have done fewer steps than other weights.
    Raises DamagedError if they contradict the checkpoint's, or if the state does not fit; see `training.restore`.
    """
    own = optimizer.state_dict()["param_groups"]
    kind = "muon" if isinstance(optimizer, MuonWithAdamW) else "adamw"
    for saved, group in zip(optimizer_groups(checkpoint, kind), own, strict=True):
        check_optimizer_settings(saved, group)
    parameters = list(parameters_of(optimizer, model).values())
    state = shard_like(optimizer_state(checkpoint, optimizer, model, alignment_has_ended), parameters)
    optimizer.load_state_dict({"state": state, "param_groups": own})
    for values in optimizer.state.values():  # own memory: the file is memory-mapped and may be deleted later
        values.update(
            {name: v.clone() for name, v in values.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
        )


def initialize_from(path: str | Path, model: SiT, average: SiT) -> list[str]:
    """Give a new run the averaged weights of a checkpoint; return the names of the weights that did not fit.

    Blocks and the embeddings of latents and time must fit, and so must norms and rotary positions. Labels, projectors,
    class slot, lead of the class token and SPRINT may differ, and so may the resolution: its position tables are
    computed. If the class token is standardised in one of both networks only, the layers of the class slot are newly
    initialised. Statistics are those of the new run.

    Raises:
        InputError: the weights belong to another network, or cannot be read.
    """
    checkpoint = load_checkpoint(path)
    given, own = network_weights(checkpoint, "ema", path), model.state_dict()
    entry = checkpoint.get("network")
    held = {**(entry if isinstance(entry, dict) else {}), **switches_of_weights(given)}
    for name in ("norm", "rope"):  # the weights of the blocks do not show these
        if (value := held.get(name, "layer")) != (wanted := getattr(model.config, name)):
            raise InputError(f"--init-from {path}: its network has {name} {value}; by the flags it is {wanted}")
    wanted = [name for name in own if name != "pos_embed" and not name.startswith(("feat_rope.", "cls_scale."))]
    other_units = ("cls_scale.mean" in given) != (model.cls_scale is not None)
    initial = [
        name
        for name in wanted
        if name not in given or given[name].shape != own[name].shape or (other_units and name.startswith(CLASS_SLOT))
    ]
    different = [name for name in given if name not in own] + initial
    if required := [name for name in different if name.startswith(("blocks.", "x_embedder.", "t_embedder."))]:
        raise InputError(f"--init-from {path}: holds another network than that of the flags; {required[0]} differs")
    own.update({name: given[name] for name in wanted if name not in initial})
    check_finite(own, f"--init-from {path}")
    model.load_state_dict(own)
    average.load_state_dict(own)
    return initial


def load_resumable(path: Path, verify: bool = True) -> dict[str, Any]:
    """Return a checkpoint from which a run can be resumed."""
    checkpoint = load_checkpoint(path, verify)
    held = checkpoint.keys() if saved_settings(checkpoint, path) else checkpoint.keys() - {"args"}
    if missing := {"model", "ema", "opt", "args", "steps"} - held:
        lacks = f"it lacks {', '.join(sorted(missing))}"
        start = "an exported network starts a new run by --init-from"
        raise InputError(f"{path}: cannot be resumed, {lacks}; allowed: a checkpoint of a run, and {start}")
    steps_done(checkpoint, path)
    return checkpoint
