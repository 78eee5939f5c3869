"""What a checkpoint restores besides the weights, compared with what it must be before anything of it is used.

The state and settings of AdamW and Muon, the state of the loss scaler, and the sums of the log. PyTorch itself loads a
state that is empty, has moments of another parameter, or other settings without an error. Allowed are the files of this
project, and published ones: AdamW in any implementation, its `step` as a tensor or a number, parameters in the order of
the older REPA layout.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.cli import flag
from common.errors import InputError, shown
from models.checkpoint import network_weights
from training.metrics import COUNTS
from training.optimizers import MuonWithAdamW
from training.record import DamagedError, same_value

IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")  # how an optimizer computes, not what
GROUPS = {"adamw": ("AdamW",), "muon": ("AdamW", "Muon")}  # groups of parameters, by the values of --optimizer
# Settings of every AdamW, besides the learning rate, and their flags; and of every Muon, which have none.
REQUIRED = {
    "betas": "--adam-beta1, --adam-beta2", "eps": "--adam-epsilon", "weight_decay": "--adam-weight-decay",
}  # fmt: skip
REQUIRED_OF_MUON = ("momentum", "nesterov", "weight_decay", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
MOMENTS = {"exp_avg": -math.inf, "exp_avg_sq": 0.0}  # of AdamW, with their least value
MOMENTUM = "momentum_buffer"  # of Muon
SCALER = ("growth_factor", "backoff_factor", "growth_interval")  # settings of a loss scaler
LARGEST_SCALE = 2.0**127  # of a loss scaler: the largest power of two in float32
MOST_SECONDS = 1e10  # of training: 300 years
State = dict[int, dict[str, Tensor]]


@contextlib.contextmanager
def restoring(path: Path | None) -> Iterator[None]:
    """Name the checkpoint `path` in the errors about what it restores."""
    try:
        yield
    except DamagedError as error:
        raise InputError(
            f"{path}: cannot be resumed: {error}. Allowed: a complete checkpoint of this network; to start another run "
            "from its weights: a new --exp-name and --init-from CHECKPOINT"
        ) from error


def number(value: Any, what: str, low: float = -math.inf, high: float = math.inf, whole: bool = False) -> float:
    """Return a number of a checkpoint as Python's. Raises DamagedError if it is none, or outside the range."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.dtype != torch.bool:
        value = value.item()
    fits = type(value) in (int, float) and abs(value) <= sys.float_info.max and low <= value <= high
    if not fits or (whole and value != int(value)):
        least, most = (
            "" if abs(bound) == math.inf else f" {word} {bound:g}" for word, bound in (("from", low), ("to", high))
        )
        raise DamagedError(f"{what} is {describe(value)}; expected a {'whole ' * whole}number{least}{most}")
    return value


def describe(value: Any) -> str:
    """Return a value of a checkpoint for a message, in one short line."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return shown(value)


def parameters_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of an optimizer by name, in its order, which gives the indices of its state."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}


def optimizer_state(
    checkpoint: dict[str, Any], optimizer: torch.optim.Optimizer, model: nn.Module, alignment_has_ended: bool = False
) -> State:
    """Return the state for an optimizer of `model` by its indices of the parameters; {} if there is none at step 0.

    Of other optimizers than AdamW and `MuonWithAdamW` only the shapes are compared. If the alignment has ended, the
    projectors may have done fewer steps than the other weights.
    Raises DamagedError, naming the parameter, if a state is missing or is not one that the optimizer can have.
    """
    state, is_known = _entry(checkpoint, "state", dict), isinstance(optimizer, torch.optim.AdamW | MuonWithAdamW)
    parameters, steps = parameters_of(optimizer, model), checkpoint["steps"]
    if not state and (steps == 0 or not is_known):
        return {}
    names = list(parameters)
    if unknown := [index for index in state if type(index) is not int or not 0 <= index < len(names)]:
        raise DamagedError(f"its optimizer has a state for parameter {shown(unknown[0])}; the network has {len(names)}")
    placed = place_state(checkpoint, parameters)
    if not is_known:
        return placed
    trained = {index for index, name in enumerate(names) if parameters[name].requires_grad}
    if wrong := sorted(trained ^ placed.keys()):
        held = "no state for {}" if wrong[0] in trained else "a state for {}, which is not trained"
        raise DamagedError(f"its optimizer has {held.format(names[wrong[0]])}")
    of_adamw = len(optimizer.param_groups[0]["params"])
    checked = {
        index: _state_of_parameter(placed[index], names[index], parameters[names[index]].shape, steps, index < of_adamw)
        for index in sorted(placed)
    }
    aligned = [index for index in checked if alignment_has_ended and names[index].startswith("projectors.")]
    counts, aligned_counts = (
        {checked[index]["step"].item() for index in group if "step" in checked[index]}
        for group in (checked.keys() - aligned, aligned)
    )
    if len(counts) > 1 or len(aligned_counts) > 1 or max(aligned_counts, default=0) > max(counts, default=0):
        done = counts | aligned_counts
        counted = f"{min(done):g} to {max(done):g} steps"
        raise DamagedError(f"its optimizer has done {counted}, not equally many everywhere")
    for index, values in checked.items() if counts == {0.0} else ():
        if any(values[key].any() for key in values.keys() - {"step"}):
            raise DamagedError(f"its optimizer's moments of {names[index]} are not 0 after 0 steps")
    return checked


def place_state(checkpoint: dict[str, Any], parameters: Mapping[str, Tensor]) -> dict[int, dict[str, Any]]:
    """Return the optimizer state, which a checkpoint has by index of the parameter, by the indices in `parameters`.

    A checkpoint of the older REPA layout may count in the order of its weights; that order is used where ours does not
    fit. Without this check of the shapes, a step would read the moments of one parameter as those of another.
    """
    state = checkpoint["opt"]["state"]
    names, shapes = list(parameters), [parameter.shape for parameter in parameters.values()]
    order_of_file = [name for name in network_weights(checkpoint, "model") if name in parameters]
    wrong = []
    for order in (names, order_of_file):
        placed = {names.index(order[index]): values for index, values in state.items() if index < len(order)}
        wrong = [index for index, values in placed.items() if not _fits(values, shapes[index])]
        if not wrong and len(placed) == len(state):
            return placed
    index = next(index for index in state if not _fits(state[index], shapes[index]))
    raise DamagedError(f"its optimizer's moments have other shapes than the parameters; the first is {names[index]}")


def _fits(values: Any, shape: torch.Size) -> bool:
    tensors = values.values() if isinstance(values, Mapping) else ()
    return all(value.shape == shape for value in tensors if isinstance(value, Tensor) and value.ndim)


def _state_of_parameter(
    values: Any, name: str, shape: torch.Size, steps: int, is_adamw: bool = True
) -> dict[str, Tensor]:
    """Return AdamW's or Muon's state of one parameter, AdamW's `step` as a tensor.

    Raises DamagedError if it has wrong values.
    """
    expected = ("exp_avg", "exp_avg_sq", "step") if is_adamw else (MOMENTUM,)
    if not isinstance(values, Mapping) or set(values) != set(expected):
        held = ", ".join(sorted(map(str, values))) if isinstance(values, Mapping) else describe(values)
        raise DamagedError(f"its optimizer has {held or 'nothing'} for {name}; expected {', '.join(expected)}")
    if not is_adamw:
        return {MOMENTUM: _moment(values[MOMENTUM], f"its optimizer's {MOMENTUM} of {name}", shape, -math.inf)}
    step = number(values["step"], f"its optimizer's step of {name}", 0, steps, whole=True)
    moments = {
        key: _moment(values[key], f"its optimizer's {key} of {name}", shape, least) for key, least in MOMENTS.items()
    }
    return {"step": torch.tensor(float(step)), **moments}


def _moment(value: Any, what: str, shape: torch.Size, least: float) -> Tensor:
    """Return a moment of a parameter. Raises DamagedError if it is not float32, of this shape, and finite."""
    if isinstance(value, Tensor) and shape == (1,):
        value = value.reshape(-1)  # a scalar of the value residual may have no dimension in files of SR-DiT
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.shape != shape:
        raise DamagedError(f"{what} is {describe(value)}; expected a tensor {tuple(shape)} of float32")
    low, high = (bound.item() for bound in value.aminmax())  # NaN if there is one
    if not (math.isfinite(low) and math.isfinite(high) and low >= least):
        allowed = "finite" if least else "finite, 0 or greater"
        raise DamagedError(f"{what} has values from {low:g} to {high:g}; allowed: {allowed}")
    return value


def _entry(checkpoint: dict[str, Any], name: str, kind: type) -> Any:
    """Return an entry of the optimizer. Raises DamagedError if it has none of that type."""
    held = checkpoint["opt"].get(name) if isinstance(checkpoint["opt"], Mapping) else None
    if not isinstance(held, kind):
        raise DamagedError(f"its optimizer has no {name}; expected a dict with state and param_groups")
    return held


def optimizer_groups(checkpoint: dict[str, Any], optimizer: str) -> list[Mapping[str, Any]]:
    """Return the groups of parameters of a checkpoint's optimizer, which are those of a value of --optimizer.

    Raises DamagedError if there are other groups.
    """
    groups, names = _entry(checkpoint, "param_groups", list), GROUPS[optimizer]
    if len(groups) != len(names) or not all(isinstance(group, Mapping) for group in groups):
        wanted = f"expected {len(names)}, of {' and '.join(names)}, by --optimizer {optimizer}"
        raise DamagedError(f"its optimizer has {len(groups)} groups of parameters; {wanted}")
    return groups


def check_optimizer_settings(group: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise DamagedError if the settings of a checkpoint's optimizer are not `own`, those of the flags.

    The flags agree with the checkpoint's `args` (`training.record.check_same_run`), so a difference is damage. The
    learning rate may differ, see `saved_learning_rate`. Settings that only newer optimizers have may be missing.
    """
    if not same_value(listed := group.get("params"), own["params"]):
        raise DamagedError(
            f"its optimizer has the parameters {shown(listed)}; expected {own['params'][0]} .. {own['params'][-1]} "
            "in order"
        )
    required = REQUIRED if "betas" in own else dict.fromkeys(REQUIRED_OF_MUON)
    for name in own.keys() - {*IMPLEMENTATION, "params", "lr"}:
        saved, wanted = (list(one) if isinstance(one, tuple) else one for one in (group.get(name), own[name]))
        if (name in group or name in required) and not same_value(saved, wanted):
            flags = f"; flags: {required[name]}" if required.get(name) else ""
            raise DamagedError(f"its optimizer has {name} {describe(saved)}, but the run has {wanted}{flags}")


def saved_learning_rate(group: Mapping[str, Any], settings: Mapping[str, Any], name: str, given: bool) -> float:
    """Return the learning rate of a group of parameters of a checkpoint's optimizer.

    `settings` are those that the checkpoint has, the rate among them as `name`; `given`: whether its flag decides.
    Raises DamagedError if it is no learning rate, or another one than in the settings.
    """
    rate = number(group.get("lr"), "the learning rate of its optimizer", 0)
    recorded = settings.get(name)
    if recorded is not None and not given and not same_value(rate, recorded):
        raise DamagedError(
            f"the learning rate of its optimizer is {rate:g}, that of its settings is {describe(recorded)}; "
            f"{flag(name)} decides"
        )
    return rate


def check_scaler(state: Any, own: Mapping[str, Any] | None) -> None:
    """Raise DamagedError if the state of a loss scaler cannot be one. `own`: the state of this run's scaler, if any."""
    if state is None or state == {}:
        return
    names = ("scale", *SCALER, "_growth_tracker")
    if not isinstance(state, Mapping) or set(state) != set(names):
        raise DamagedError(f"its loss scaler is {describe(state)}; expected a dict with {', '.join(names)}")
    values = {name: number(state[name], f"its loss scaler's {name}", 0, LARGEST_SCALE) for name in names}
    scale, tracker = values["scale"], values["_growth_tracker"]
    if scale <= 0 or tracker != int(tracker):
        raise DamagedError(f"its loss scaler has scale {scale:g} and _growth_tracker {tracker:g}")
    for name in SCALER if own else ():
        if values[name] != own[name]:
            raise DamagedError(f"its loss scaler's {name} is {values[name]:g}; expected {own[name]:g}")


def check_log(state: Any) -> None:
    """Raise DamagedError if the sums of the log, which `RunLog.state` returned, cannot be such."""
    if state is None:
        return
    if not isinstance(state, Mapping) or not isinstance(state.get("sums"), Mapping):
        raise DamagedError(f"its log is {describe(state)}; expected a dict with sums, steps and seconds")
    for name, value in state["sums"].items():
        if not isinstance(name, str):
            raise DamagedError(f"its log has a sum named {describe(name)}; expected a text")
        number(value, f"its log's sum of {name[:40]}")
    number(state.get("seconds"), "its log's seconds", 0, MOST_SECONDS)
    for name in ("steps", *COUNTS):
        number(state.get(name, 0 if name in COUNTS else None), f"its log's {name}", 0, whole=True)
