"""Everything a checkpoint restores is compared with what it must be: optimizer, loss scaler, log, steps."""

import argparse
import copy
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from models.checkpoint import MOST_STEPS, steps_done
from models.sit import SiT, SiT_models
from training.record import DamagedError
from training.restore import (
    check_log,
    check_optimizer_settings,
    check_scaler,
    optimizer_groups,
    optimizer_state,
    place_state,
    restoring,
    saved_learning_rate,
)

SIZES = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "z_dims": [8], "projector_dim": 8, "encoder_depth": 1,
    "input_size": 4,
}  # fmt: skip
STEPS = 3


def adamw(network, **more):
    return torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0, **more)


def trained(**more):
    """Return a network and its checkpoint after STEPS steps."""
    torch.manual_seed(0)
    network = SiT(patch_size=2, num_classes=3, **SIZES)
    optimizer = adamw(network, **more)
    for _ in range(STEPS):
        for parameter in network.parameters():
            parameter.grad = torch.rand_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    args = argparse.Namespace(learning_rate=1e-3)
    return network, {
        "model": network.state_dict(), "opt": optimizer.state_dict(), "args": args, "steps": STEPS,
    }  # fmt: skip


@pytest.fixture(scope="module")
def saved():
    return trained(fused=True)


@pytest.fixture
def network(saved):
    return saved[0]


@pytest.fixture
def checkpoint(saved):
    return {**saved[1], "opt": copy.deepcopy(saved[1]["opt"])}


def test_a_state_is_restored_bit_for_bit(network, checkpoint):
    placed = optimizer_state(checkpoint, adamw(network), network)
    for index, values in checkpoint["opt"]["state"].items():
        assert placed[index].keys() == values.keys()
        assert all(torch.equal(placed[index][key], value) for key, value in values.items())


@pytest.mark.parametrize("kind", [int, float, torch.tensor])
def test_a_step_may_be_a_number_or_a_tensor_and_skipped_steps_do_not_count(network, checkpoint, kind):
    for values in checkpoint["opt"]["state"].values():
        values["step"] = kind(STEPS - 1)
    placed = optimizer_state(checkpoint, adamw(network), network)
    assert {(values["step"].item(), values["step"].dtype) for values in placed.values()} == {(2.0, torch.float32)}


def test_an_unfused_state_of_an_older_torch_is_restored():
    network, checkpoint = trained(foreach=False)
    group = checkpoint["opt"]["param_groups"][0]
    for name in ("decoupled_weight_decay", "maximize", "fused", "foreach"):
        group.pop(name, None)
    check_optimizer_settings(group, adamw(network, fused=True).state_dict()["param_groups"][0])
    assert optimizer_state(checkpoint, adamw(network), network)


def test_a_state_may_be_empty_at_step_0_only(network, checkpoint):
    checkpoint["opt"]["state"] = {}
    with pytest.raises(InputError, match=r"no state for x_embedder\.proj\.weight"):
        optimizer_state(checkpoint, adamw(network), network)
    assert optimizer_state({**checkpoint, "steps": 0}, adamw(network), network) == {}


def change_first(name, change):
    return lambda state: state[1].update({name: change(state[1][name])})


def set_all_steps(value):
    return lambda state: [values.update(step=value) for values in state.values()]


NAN = float("nan")
BAD_STATES = {
    "of the positions": (lambda state: state.update({0: state[1]}), "other shapes|not trained"),
    "index of text": (lambda state: state.update({"1": state.pop(1)}), "parameter '1'"),
    "no dict": (
        lambda state: state.update({1: [1, 2]}),
        r"has \[1, 2\] for x_embedder\.proj\.weight; expected exp_avg",
    ),
    "no moment": (lambda state: state[1].pop("exp_avg"), "has exp_avg_sq, step for x_embedder"),
    "amsgrad": (lambda state: state[1].update(max_exp_avg_sq=state[1]["exp_avg_sq"]), "max_exp_avg_sq"),
    "scalar": (change_first("exp_avg", lambda value: torch.tensor(0.0)), r"a tensor \(\) of float32; expected"),
    "half": (change_first("exp_avg", torch.Tensor.half), r"of float16; expected a tensor \(.*\) of float32"),
    r"list": (change_first("exp_avg", torch.Tensor.tolist), r"expected a tensor \(.*\) of float32"),
    "nan": (change_first("exp_avg", lambda value: value.index_fill(0, torch.tensor([2]), NAN)), "from nan"),
    "infinite": (change_first("exp_avg_sq", lambda value: value.index_fill(0, torch.tensor([2]), torch.inf)), "to inf"),
    "negative": (change_first("exp_avg_sq", torch.neg), "exp_avg_sq of .*allowed: finite, 0 or greater"),
    "one step differs": (change_first("step", lambda value: value - 1), "2 to 3 steps"),
    "more steps": (set_all_steps(STEPS + 1), "step of .* is 4; expected a whole number from 0 to 3"),
    "negative step": (set_all_steps(-1), "is -1; expected a whole number"),
    "nan step": (set_all_steps(torch.tensor(NAN)), "is nan; expected"),
    "steps of each element": (set_all_steps(torch.ones(2)), "other shapes|expected a whole number"),
    "no step yet": (set_all_steps(0), "moments of .* are not 0 after 0 steps"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_adamw_cannot_have_is_refused(network, checkpoint, case):
    damage, text = BAD_STATES[case]
    damage(checkpoint["opt"]["state"])
    with pytest.raises(DamagedError, match=text) as caught:
        optimizer_state(checkpoint, adamw(network), network)
    assert "\n" not in str(caught.value)


def test_an_error_names_the_checkpoint_and_what_to_do():
    text = r"^a/b\.pt: cannot be resumed: its log is bad\. Allowed: .*--init-from CHECKPOINT$"
    with pytest.raises(InputError, match=text), restoring(Path("a/b.pt")):
        raise DamagedError("its log is bad")


@pytest.mark.parametrize("opt", [None, {}, {"state": [], "param_groups": {}}])
def test_an_optimizer_of_another_form_is_refused(network, checkpoint, opt):
    bad = {**checkpoint, "opt": opt}
    with pytest.raises(InputError, match=r"its optimizer has no state; expected a dict"):
        optimizer_state(bad, adamw(network), network)
    with pytest.raises(InputError, match=r"its optimizer has no param_groups; expected a dict"):
        optimizer_groups(bad, "adamw")


BAD_GROUPS = {
    "betas": (
        {"betas": (0.9, 0.5)},
        r"has betas \[0\.9, 0\.5\], but the run has \[0\.9, 0\.999\]; flags: --adam-beta1",
    ),
    "eps": ({"eps": 0}, "has eps 0, but the run has 1e-08"),
    "tensor": ({"weight_decay": torch.zeros(3)}, "has weight_decay a tensor"),
    "amsgrad": ({"amsgrad": True}, "has amsgrad True"),
    "Adam": ({"decoupled_weight_decay": False}, "has decoupled_weight_decay False"),
    "text": ({"betas": "0.9"}, "has betas '0.9'"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_settings_that_contradict_the_flags_are_damage(network, checkpoint, case):
    change, text = BAD_GROUPS[case]
    own = adamw(network, fused=True).state_dict()["param_groups"][0]
    group = checkpoint["opt"]["param_groups"][0]
    check_optimizer_settings(group, own)
    with pytest.raises(InputError, match=text):
        check_optimizer_settings(group | change, own)


def test_the_group_of_parameters_is_checked(network, checkpoint):
    own = adamw(network, fused=True).state_dict()["param_groups"][0]
    groups = checkpoint["opt"]["param_groups"]
    assert optimizer_groups(checkpoint, "adamw") is groups
    for params in (own["params"][::-1], own["params"][:-1], None, torch.ones(2)):
        with pytest.raises(InputError, match=r"has the parameters .*; expected 0 \.\. \d+ in order"):
            check_optimizer_settings({**groups[0], "params": params}, own)
    for several in ([], groups * 2, ["x"]):
        with pytest.raises(InputError, match="groups of parameters; expected 1, of AdamW, by --optimizer adamw"):
            optimizer_groups({"opt": {"param_groups": several}}, "adamw")


def test_a_learning_rate_that_contradicts_the_settings_needs_the_flag(checkpoint):
    settings, group = {"learning_rate": 1e-3}, checkpoint["opt"]["param_groups"][0]
    assert saved_learning_rate(group, settings, "learning_rate", given=False) == 1e-3
    assert saved_learning_rate(group, {}, "learning_rate", given=False) == 1e-3
    group["lr"] = 0.5
    with pytest.raises(InputError, match=r"optimizer is 0\.5, that of its settings is 0\.001; --learning-rate decides"):
        saved_learning_rate(group, settings, "learning_rate", given=False)
    assert saved_learning_rate(group, settings, "learning_rate", given=True) == 0.5
    for wrong in (None, "1e-3", True, NAN, 10**400, -1.0, torch.ones(2), torch.ones(1) > 0):
        group["lr"] = wrong
        with pytest.raises(InputError, match=r"the learning rate of its optimizer is .*expected a number from 0"):
            saved_learning_rate(group, settings, "learning_rate", given=True)


SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 3}


def test_the_loss_scaler_is_checked():
    for good in (None, {}, SCALER):
        check_scaler(good, SCALER)
        check_scaler(good, None)
    wrong = [{"scale": 0.0}, {"scale": NAN}, {"scale": -1.0}, {"scale": 1e39}, {"scale": "1"}, {"_growth_tracker": 0.5}]
    wrong += [{"growth_factor": 1e9}, {"backoff_factor": 1.0}, {"growth_interval": None}, {"more": 1}]
    for change in wrong:
        with pytest.raises(InputError, match="its loss scaler"):
            check_scaler(SCALER | change, SCALER)
    for other in ([], "scaler", 3, {"scale": 1.0}):
        with pytest.raises(InputError, match=r"its loss scaler is .*expected a dict with scale"):
            check_scaler(other, None)


def test_the_log_is_checked():
    good = {"sums": {"loss": 1.5}, "steps": 2, "seconds": 3.5, "bad_steps": 0}
    check_log(None)
    check_log(good)
    wrong = [{"sums": {"loss": "1"}}, {"sums": {"loss": NAN}}, {"sums": {1: 1.0}}, {"sums": []}, {"steps": 0.5}]
    wrong += [{"steps": -1}, {"steps": None}, {"seconds": 1e300}, {"seconds": None}, {"bad_steps": True}]
    for change in wrong:
        with pytest.raises(InputError, match="its log"):
            check_log(good | change)
    with pytest.raises(InputError, match="its log is "):
        check_log([])


@pytest.mark.parametrize("steps", [True, 1.0, "4", None, -1, MOST_STEPS + 1, 10**400, [4]])
def test_steps_are_a_whole_number_within_bounds(steps):
    with pytest.raises(InputError, match=r"its steps are .*expected a whole number from 0 to 1,000,000,000"):
        steps_done({"steps": steps})


def test_moments_are_placed_by_shape_for_any_order_of_the_parameters():
    """As in files of the older REPA layout."""
    model = SiT_models["SiT-S/8"](depth=3, hidden_size=48, num_heads=2, z_dims=[32], encoder_depth=2, projector_dim=64)
    parameters = dict(model.named_parameters())
    names = list(parameters)
    old = sorted(names, key=lambda name: (name.startswith("blocks.2"), names.index(name)))  # at the end, say
    weights = {name: value for name in old for key, value in model.state_dict().items() if key == name}
    moments = {name: {"exp_avg": torch.full_like(weights[name], number)} for number, name in enumerate(names)}
    for order in (names, old):
        opt = {"state": {index: moments[name] for index, name in enumerate(order)}}
        placed = place_state({"model": {name: weights[name] for name in order}, "opt": opt}, parameters)
        assert all(moment["exp_avg"].flatten()[0] == index for index, moment in placed.items())
    opt["state"][3] = {"exp_avg": torch.zeros(5)}
    with pytest.raises(ValueError, match="other shapes"):
        place_state({"model": weights, "opt": opt}, parameters)
