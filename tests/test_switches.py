"""Files of SR-DiT, and files whose weights and settings say different things about the switches."""

import argparse
import json
from dataclasses import replace

import pytest
import torch

from common.errors import InputError
from export import export
from models.checkpoint import build_model, load_checkpoint, load_model, network_config, network_weights
from models.sit import SiT
from models.sit_config import PRESETS, SiTConfig
from models.switches import switches_of_weights
from tests.test_sit import inputs, randomise
from tests.test_srdit import OF_SR_DIT
from training.config import RunFacts, parse_args
from training.optimizers import make_optimizer
from training.record import DamagedError, check_same_network, check_same_run
from training.restore import optimizer_state
from training.state import initialize_from

SIZES = {"input_size": 4, "in_channels": 8, "num_classes": 5, "z_dims": [24], "projector_dim": 16, "patch_size": 1}


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    """Make SiT-B a small network with six heads: a released file does not have the number of heads."""
    monkeypatch.setitem(PRESETS, "B", (6, 48, 3))


def network(**options) -> SiT:
    torch.manual_seed(0)
    sizes = {"depth": 6, "hidden_size": 48, "num_heads": 6, "encoder_depth": 2}
    return randomise(SiT(**SIZES | sizes | OF_SR_DIT | options)).eval()


def released(model: SiT, /, **args) -> dict:
    """Return a checkpoint as SR-DiT's code writes it. Its scalars have no dimension."""
    state = model.state_dict()
    state = {name: value.squeeze() if name.endswith("v1_lambda") else value for name, value in state.items()}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    moments = {
        1 + index: {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(state[name]),
                    "exp_avg_sq": torch.zeros_like(state[name])}
        for index, name in enumerate(names)
    }  # fmt: skip
    opt = {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(range(1 + len(names)))}]}
    settings = {"model": "SiT-B/1", "qk_norm": True, "encoder_depth": 4, "path_type": "linear", **args}
    return {"model": state, "ema": state, "opt": opt, "args": argparse.Namespace(**settings), "steps": 3}


def same_outputs(one: SiT, other: SiT) -> bool:
    x, t, y, cls = inputs(one)
    pairs = zip(one(x, t, y, cls, project=False)[::2], other(x, t, y, cls, project=False)[::2], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_released_checkpoint_rebuilds_its_network_from_the_file_alone(tmp_path):
    model = network()
    torch.save(released(model), tmp_path / "srdit.pt")
    rebuilt = load_model(tmp_path / "srdit.pt")
    assert rebuilt.config == model.config  # 6 heads from the width of feat_rope, alignment after block 2
    assert same_outputs(model, rebuilt)
    assert rebuilt.state_dict().keys() == model.state_dict().keys()
    export(tmp_path / "srdit.pt", tmp_path / "folder")
    exported = load_model(tmp_path / "folder")
    assert exported.config == model.config and same_outputs(model, exported)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert {name: config[name] for name in OF_SR_DIT} == OF_SR_DIT


@pytest.mark.parametrize("switch", OF_SR_DIT)
def test_each_switch_is_found_in_the_weights(switch):
    model = network(**{**{name: getattr(SiTConfig, name) for name in OF_SR_DIT}, switch: OF_SR_DIT[switch]})
    known = {"model": "SiT-B/1", "num_heads": 6, "encoder_depth": 2}
    assert network_config({"ema": model.state_dict(), "args": known}) == model.config


def test_without_a_class_slot_the_norm_comes_from_the_settings():
    model = network(cls_token_dim=None)
    for norm in ("rms", "layer"):
        assert network_config({"ema": model.state_dict(), "args": {"norm": norm}}).norm == norm
    assert network_config({"ema": model.state_dict(), "args": {"sprint_keep": 0.5}}).sprint_keep == 0.5


def test_the_lead_of_the_class_token_comes_from_the_settings_and_must_fit_the_weights():
    model = network(cls_lead=0.3)
    assert network_config(released(model, cls_lead=0.3)) == model.config
    for odd, names in (
        (released(model), r"unexpected: 4 \(t_cls_embedder\.mlp\.0\.bias"),
        (released(network(), cls_lead=0.3), r"missing: 4 \(t_cls_embedder\.mlp\.0\.bias"),
    ):
        with pytest.raises(InputError, match=f"odd.pt: the weights do not fit the network that it describes; {names}"):
            build_model(odd, source="odd.pt")
    entry = {**released(model, cls_lead=0.3), "network": {**model.config.to_json(), "cls_lead": 0.1}}
    with pytest.raises(InputError, match=r"settings of its run have cls_lead 0\.3, but the weights have 0\.1"):
        build_model(entry, source="odd.pt")
    with pytest.raises(InputError, match=r"odd.pt: network: its cls_lead is 2; expected a number from 0 to 1"):
        build_model(released(model, cls_lead=2), source="odd.pt")


def test_a_run_with_a_lead_starts_from_weights_without_one(tmp_path):
    torch.save(released(network()), tmp_path / "plain.pt")
    model, average = network(cls_lead=0.3), network(cls_lead=0.3)
    assert initialize_from(tmp_path / "plain.pt", model, average) == [
        f"t_cls_embedder.mlp.{k}.{kind}" for k in (0, 2) for kind in ("weight", "bias")
    ]


CONTRADICTIONS = {
    "norm of queries": ({"qk_norm": False}, "qk_norm False, but the weights have rms"),
    "kind of norm": ({"qk_norm": "layer"}, "qk_norm 'layer', but the weights have rms"),
    "norm": ({"norm": "layer"}, "norm 'layer', but the weights have rms"),
    "rope": ({"rope": False}, "rope False, but the weights have True"),
    "values": ({"value_residual": False}, "value_residual False, but the weights have True"),
    "sprint": ({"sprint": False}, "sprint False, but the weights have True"),
    "patch size": ({"model": "SiT-B/2"}, "model 'SiT-B/2', but the weights have depth 6, width 48, patch 1"),
    "size": ({"model": "SiT-XL/1"}, "model 'SiT-XL/1', but the weights have depth 6, width 48, patch 1"),
}


@pytest.mark.parametrize(("args", "text"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_settings_that_contradict_the_weights_are_refused_with_both(args, text):
    with pytest.raises(InputError, match=f"odd.pt: the settings of its run have {text}"):
        build_model(released(network(), **args), source="odd.pt")


def test_settings_of_other_code_with_the_same_names_are_no_contradiction():
    others = {"rope": "2d", "norm": "RMSNorm", "sprint": 0.75, "qk_norm": "rms", "depth": 6, "model": "SiT-XL/1"}
    assert network_config(released(network(), **others)) == network().config


@pytest.mark.parametrize("switch", ["norm", "rope", "value_residual", "sprint"])
def test_an_entry_that_contradicts_the_weights_is_refused(switch):
    model = network()
    entry = {**model.config.to_json(), switch: getattr(SiTConfig, switch)}
    with pytest.raises(InputError, match=f"odd.pt: network has {switch} .*, but the weights have "):
        build_model({"ema": model.state_dict(), "network": entry}, source="odd.pt")


def test_tables_that_are_not_finite_are_refused():
    checkpoint = released(network())
    checkpoint["ema"]["feat_rope.freqs_sin"] = torch.full((16, 8), torch.nan)
    with pytest.raises(InputError, match=r"odd\.pt: feat_rope\.freqs_sin contains numbers that are not finite"):
        build_model(checkpoint, source="odd.pt")


def test_weights_of_the_published_shape_load_directly():
    model = network()
    other = network(cls_token_dim=24)
    other.load_state_dict(released(model)["model"])
    assert same_outputs(model, other)


def test_the_optimizer_of_a_released_checkpoint_is_resumed():
    model = network()
    checkpoint = released(model)
    names = [name for name, _ in model.named_parameters()]
    state = optimizer_state(checkpoint, make_optimizer(model, parse_args(["--exp-name", "x"])), model)
    assert state[names.index("blocks.1.attn.v1_lambda")]["exp_avg"].shape == (1,)
    assert len(state) == len(names) - 1


@pytest.mark.parametrize("switch", OF_SR_DIT)
def test_a_resumed_run_must_have_the_switches_of_its_checkpoint(switch):
    """With and without the description of the network in the checkpoint."""
    model = network()
    own = replace(model.config, **{switch: getattr(SiTConfig, switch)})
    for entry in (model.config.to_json(), None):
        checkpoint = {**released(model), "network": entry}
        check_same_network(checkpoint, RunFacts(16, None, model.config), None, "run.pt")
        with pytest.raises(
            DamagedError, match=f"its network has {switch} .*; by the flags it is {getattr(own, switch)}"
        ):
            check_same_network(checkpoint, RunFacts(16, None, own), None, "run.pt")


def test_the_norm_of_queries_of_earlier_runs_was_a_switch():
    for before, now in ((False, "none"), (True, "layer"), ("rms", "rms"), ("none", "none")):
        for value in (now, {"none": False, "layer": True}.get(now, now)):
            check_same_run({"qk_norm": value}, {"qk_norm": before}, "args.json")
    with pytest.raises(InputError, match=r"--qk-norm is rms, but args\.json was started with layer"):
        check_same_run({"qk_norm": "rms"}, {"qk_norm": True}, "args.json")


def test_a_run_starts_from_weights_with_the_same_norms_and_positions_only(tmp_path):
    model = network()
    torch.save(released(model), tmp_path / "srdit.pt")
    larger = network(input_size=8)  # the tables of positions are those of its own grid
    tables = {name: value.clone() for name, value in larger.named_buffers()}
    assert initialize_from(tmp_path / "srdit.pt", larger, network(input_size=8)) == []
    assert all(torch.equal(value, tables[name]) for name, value in larger.named_buffers())
    assert torch.equal(larger.fusion_proj.weight, model.fusion_proj.weight)
    for name in ("rope", "norm"):
        other = network(**{name: getattr(SiTConfig, name)})
        with pytest.raises(InputError, match=rf"--init-from .*srdit\.pt: its network has {name} "):
            initialize_from(tmp_path / "srdit.pt", other, other)
    plain = network(sprint=False)
    torch.save({"ema": plain.state_dict(), "network": plain.config.to_json()}, tmp_path / "plain.pt")
    assert initialize_from(tmp_path / "plain.pt", network(), network()) == [
        "mask_token", "fusion_proj.weight", "fusion_proj.bias",
    ]  # fmt: skip
    norm = {"cls_token_dim": None, "norm": "rms"}  # the weights do not show the norm
    torch.save({"ema": network(**norm).state_dict(), "network": network(**norm).config.to_json()}, tmp_path / "rms.pt")
    with pytest.raises(InputError, match="its network has norm rms; by the flags it is layer"):
        initialize_from(tmp_path / "rms.pt", network(norm="layer"), network())


def test_switches_of_weights_are_read_from_names():
    assert switches_of_weights(network_weights(released(network()))) == OF_SR_DIT | {"standardized_cls": False}
    off = {"qk_norm": "none", "rope": False, "sprint": False, "standardized_cls": False}
    assert switches_of_weights([]) == off
    assert switches_of_weights(["cls_scale.mean"]) == off | {"standardized_cls": True}


def test_an_export_without_the_switches_loads(tmp_path):
    """As exports were written before."""
    off = {name: getattr(SiTConfig, name) for name in OF_SR_DIT}
    model = network(**off, encoder_depth=5)
    torch.save({"ema": model.state_dict(), "network": model.config.to_json()}, tmp_path / "plain.pt")
    export(tmp_path / "plain.pt", tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["qk_norm"] is False and not {"norm", "rope", "sprint"} & config.keys()
    assert load_checkpoint(tmp_path / "folder")["network"]["encoder_depth"] == 5
    assert load_model(tmp_path / "folder").config == model.config
