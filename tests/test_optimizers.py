"""Muon next to AdamW: what each trains, the update against a plain implementation, skipped steps, checkpoints."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from common.errors import InputError
from models.sit import SiT, SiT_models
from tests.conftest import reset_accelerate
from tests.test_sit import inputs, randomise, small
from training.config import parse_args
from training.guards import GuardedOptimizer
from training.optimizers import MuonWithAdamW, is_for_muon, make_optimizer
from training.record import DamagedError
from training.restore import check_optimizer_settings, optimizer_groups, optimizer_state, parameters_of

SPRINT = {"depth": 5, "sprint": True, "value_residual": True, "rope": True, "norm": "rms", "qk_norm": "rms"}
MATRICES = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
has_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


def settings(optimizer: str = "muon", *more: str):
    return parse_args(["--exp-name", "x", "--optimizer", optimizer, "--learning-rate", "0.002", *more])


@pytest.mark.parametrize(("more", "fused"), [({}, []), ({**SPRINT, "cls_lead": 0.3}, ["fusion_proj.weight"])])
def test_muon_trains_the_matrices_of_blocks_and_fusion(more, fused):
    with torch.device("meta"):
        network = SiT_models["SiT-B/2"](z_dims=[768], cls_token_dim=768, **more)
    found = {name for name, parameter in network.named_parameters() if is_for_muon(name, parameter)}
    assert found == {f"blocks.{n}.{name}" for n in range(network.config.depth) for name in MATRICES} | set(fused)
    if has_muon.args[0]:
        return
    optimizer = make_optimizer(network, settings())
    adamw, muon = optimizer.param_groups
    names = list(parameters_of(optimizer, network))
    assert set(names) == {name for name, _ in network.named_parameters()} and set(names[-len(found) :]) == found
    assert (len(muon["params"]), muon["lr"], muon["weight_decay"]) == (len(found), 1e-3, 0.0)
    assert muon["nesterov"] is True and muon["momentum"] == 0.95 and (adamw["lr"], adamw["fused"]) == (0.002, True)


def plain_muon(weight, momentum, gradient, rate):
    """Muon from its description: Nesterov momentum, five Newton-Schulz steps in bfloat16, the "original" factor."""
    momentum = momentum + 0.05 * (gradient - momentum)
    x = (gradient + 0.95 * (momentum - gradient)).bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.float().square().sum().sqrt().bfloat16()
    for _ in range(5):
        gram = (x.float() @ x.float().mT).bfloat16()
        polynomial = (-4.775 * gram.float() + 2.0315 * (gram.float() @ gram.float())).bfloat16()
        x = (3.4445 * x.float() + polynomial.float() @ x.float()).bfloat16()
    x = x.mT if tall else x
    return weight - rate * math.sqrt(max(1, weight.shape[0] / weight.shape[1])) * x.float(), momentum


@has_muon
def test_the_update_is_that_of_a_plain_newton_schulz_and_of_adamw():
    network = randomise(small(**SPRINT))
    optimizer = make_optimizer(network, settings())
    twin = copy.deepcopy(network)
    adamw = torch.optim.AdamW(
        [p for name, p in twin.named_parameters() if not is_for_muon(name, p)], lr=0.002, weight_decay=0.0, fused=True
    )
    momenta = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for _ in range(3):
        expected, before = {}, {}
        for (name, parameter), other in zip(network.named_parameters(), twin.parameters(), strict=True):
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
                other.grad = parameter.grad.clone()
            if is_for_muon(name, parameter):
                expected[name], momenta[name] = plain_muon(parameter.detach(), momenta[name], parameter.grad, 1e-3)
                before[name] = parameter.detach().clone()
        optimizer.step()
        adamw.step()
        for (name, parameter), other in zip(network.named_parameters(), twin.parameters(), strict=True):
            if name in expected:
                error, moved = parameter - expected[name], parameter - before[name]
                # Of the many values that Newton-Schulz rounds to bfloat16, a few are rounded in the other direction.
                assert error.abs().max() < 2e-5 < 2e-4 < moved.abs().max() and error.norm() < 0.02 * moved.norm()
            else:
                assert torch.equal(parameter, other)


def guarded(factors, scaled=False):
    """Return network and optimizer after one step per factor of the loss, and the loss scaler, disabled or not."""
    reset_accelerate()
    Accelerator(cpu=True)
    network, said = randomise(small()), []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    prepared = AcceleratedOptimizer(make_optimizer(network, settings()), scaler=scaler if scaled else None)
    optimizer = GuardedOptimizer(prepared, said.append)
    for factor in factors:
        velocity, projected, cls_velocity = network(*inputs(network))
        loss = factor * sum(output.square().mean() for output in (velocity, *projected, cls_velocity))
        scaler.scale(loss).backward()
        scaler.unscale_(prepared.optimizer)
        optimizer.step(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0))
        optimizer.zero_grad()
    assert said == []
    return network, prepared.optimizer, scaler


@has_muon
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_step_changes_nothing_of_either_optimizer(poison, scaled):
    network, optimizer, _ = guarded([1.0, 2.0], scaled)
    for factors in ([1.0, poison, 2.0], [poison, 1.0, 2.0]):
        other, found, scaler = guarded(factors, scaled)
        for one, same in zip(network.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, same)
            assert optimizer.state[one].keys() == found.state[same].keys()
            assert all(torch.equal(value, found.state[same][key]) for key, value in optimizer.state[one].items())
        assert scaler.get_scale() == (512.0 if scaled else 1.0)
    (state,) = {frozenset(found.state[p]) for name, p in other.named_parameters() if is_for_muon(name, p)}
    assert state == {"momentum_buffer"}


@has_muon
def test_the_groups_keep_their_rates_when_a_step_has_a_factor():
    reset_accelerate()
    Accelerator(cpu=True)
    network = randomise(small())
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = GuardedOptimizer(AcceleratedOptimizer(make_optimizer(network, settings())))
    network(*inputs(network)).velocity.square().mean().backward()
    optimizer.step(torch.tensor(1.0), rate_factor=0.0)
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), before, strict=True))
    assert [group["lr"] for group in optimizer.state_dict()["param_groups"]] == [0.002, 1e-3]
    optimizer.step(torch.tensor(1.0))
    assert not any(torch.equal(one, other) for one, other in zip(network.blocks.parameters(), before[9:], strict=False))


@pytest.fixture(scope="module")
def saved():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    network, optimizer, _ = guarded([1.0, 2.0])
    return network, {"model": network.state_dict(), "opt": optimizer.state_dict(), "steps": 2}


@pytest.fixture
def checkpoint(saved):
    return {**saved[1], "opt": copy.deepcopy(saved[1]["opt"])}


def restored(network: SiT, checkpoint: dict, kind: str = "muon"):
    optimizer = make_optimizer(network, settings(kind))
    groups = optimizer_groups(checkpoint, kind)
    for group, own in zip(groups, optimizer.state_dict()["param_groups"], strict=True):
        check_optimizer_settings(group, own)
    return optimizer_state(checkpoint, optimizer, network)


def test_both_states_are_restored_bit_for_bit(saved, checkpoint):
    found, state = restored(saved[0], checkpoint), checkpoint["opt"]["state"]
    assert found.keys() == state.keys()
    assert all(torch.equal(found[index][key], value) for index in state for key, value in state[index].items())
    assert {key for values in state.values() for key in values} == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}


def last(opt: dict) -> dict:
    """Return the state of a matrix that Muon trains: its group is the last one."""
    return opt["state"][max(opt["state"])]


def set_counts_to_zero(opt: dict) -> None:
    """Set AdamW's state to that of 0 steps; Muon's stays."""
    for values in opt["state"].values():
        for name in values.keys() - {"momentum_buffer"}:
            values[name].zero_()


DAMAGE = {
    "no momentum": (lambda opt: opt["state"].popitem(), "no state for blocks.2.mlp.fc2.weight"),
    "empty": (lambda opt: last(opt).clear(), "has nothing for blocks.2.mlp.fc2.weight; expected momentum_buffer"),
    "AdamW's": (
        lambda opt: last(opt).update(exp_avg=last(opt).pop("momentum_buffer")),
        "has exp_avg for .*; expected momentum_buffer",
    ),
    "Muon's": (lambda opt: opt["state"][1].update(momentum_buffer=torch.zeros(2)), "other shapes"),
    "nan": (lambda opt: last(opt)["momentum_buffer"].fill_(math.nan), "momentum_buffer of .* from nan"),
    "half": (lambda opt: last(opt).update(momentum_buffer=last(opt)["momentum_buffer"].half()), "of float16"),
    "one group": (lambda opt: opt["param_groups"].pop(), "has 1 groups.*expected 2, of AdamW and Muon"),
    "momentum": (lambda opt: opt["param_groups"][1].update(momentum=0.9), "has momentum 0.9, but the run has 0.95"),
    "no nesterov": (lambda opt: opt["param_groups"][1].pop("nesterov"), "has nesterov None, but the run has True"),
    "decay": (lambda opt: opt["param_groups"][1].update(weight_decay=0.1), "has weight_decay 0.1.*has 0.0$"),
    "order": (lambda opt: opt["param_groups"][1]["params"].reverse(), r"the parameters .*; expected \d\d \.\. \d\d"),
    "no steps": (set_counts_to_zero, "moments of blocks.0.attn.qkv.weight are not 0 after 0 steps"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_state_that_the_optimizers_cannot_have_is_refused(saved, checkpoint, case):
    damage, text = DAMAGE[case]
    damage(checkpoint["opt"])
    with pytest.raises(DamagedError, match=text):
        restored(saved[0], checkpoint)


def test_the_optimizer_of_a_checkpoint_is_that_of_the_flags(saved, checkpoint):
    with pytest.raises(DamagedError, match="2 groups of parameters; expected 1, of AdamW, by --optimizer adamw"):
        restored(saved[0], checkpoint, "adamw")


def test_a_torch_without_muon_is_named(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(InputError, match=r"^--optimizer muon: needs torch 2\.9 or later; installed: torch \d"):
        settings()
    assert settings("adamw").optimizer == "adamw"


@has_muon
def test_it_is_one_optimizer_for_its_users():
    optimizer = make_optimizer(small(), settings())
    assert isinstance(optimizer, MuonWithAdamW) and optimizer.muon.state is optimizer.adamw.state is optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.muon.state is optimizer.adamw.state is optimizer.state
    assert optimizer.param_groups == optimizer.adamw.param_groups + optimizer.muon.param_groups
