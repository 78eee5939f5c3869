"""Each option, and all of them together, and what a run goes through: see `tests.option_matrix.OPTIONS`."""

import dataclasses

import pytest
import torch

import train
from common.errors import InputError
from export import export
from models.checkpoint import build_model, load_checkpoint, saved_settings
from models.interpolant import Interpolant
from tests.conftest import ENCODER, reset_accelerate
from tests.option_matrix import (
    CASES,
    OPTIONS,
    STEPS,
    WITH_MUON,
    Matrix,
    has_muon,
    losses,
    save_time,
    tensors,
    trained,
    without_description,
)
from tests.processes import Training
from tests.test_compiling import compile_with
from tests.test_sit import inputs

pytestmark = pytest.mark.cpu
LAST_ONLY = ("--checkpointing-steps", str(STEPS))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory, shared_data, encoder_weights):
    with pytest.MonkeyPatch.context() as patch:
        save_time(patch.setattr)
        yield Matrix(tmp_path_factory.mktemp("matrix"), shared_data, ENCODER, encoder_weights)


def assert_close(one, other, tolerance=0.0, *skipped):
    """Compare the runs of two checkpoints at the same step; the rows that `one` has in addition are the first ones."""
    ours, theirs = losses(one, *skipped), losses(other, *skipped)
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    assert len(theirs) > 1 and len(pairs) > 100
    for (name, a), (same, b) in [*pairs, *zip(enumerate(ours[-len(theirs) :]), enumerate(theirs), strict=False)]:
        assert isinstance(name, int) or name == same
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_one_never_stopped(matrix, case):
    matrix.alone(case)
    trained(matrix.flags(case, "resumed", *LAST_ONLY, "--resume", str(matrix.file(case, "alone", 1))))
    assert_close(matrix.file(case, "alone"), matrix.file(case, "resumed"))


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_run_equals_a_plain_one(matrix, monkeypatch, case):
    matrix.alone(case)
    compile_with(monkeypatch, "eager")
    torch._dynamo.reset()
    trained(matrix.flags(case, "compiled", *LAST_ONLY, "--compile"))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert_close(matrix.file(case, "alone"), matrix.file(case, "compiled"), 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_and_export_rebuild_the_network_alone(matrix, tmp_path, case):
    run, file = matrix.alone(case), matrix.file(case, "alone")
    export(file, tmp_path / "export")
    t_cls = {"t_cls": torch.tensor([0.2, 0.0, 1.0])} if run.facts.network.cls_lead else {}
    expected = run.ema.eval()(*inputs(run.ema), project=False, **t_cls)
    for content in (load_checkpoint(file), load_checkpoint(tmp_path / "export"), without_description(file)):
        network = build_model(content)
        config = network.config
        if "network" not in content:  # convolutions have no inner width
            config = dataclasses.replace(config, projector_dim=run.facts.network.projector_dim)
        assert config == run.facts.network
        found = network.eval()(*inputs(network), project=False, **t_cls)
        assert torch.equal(found.velocity, expected.velocity) and torch.equal(found.cls_velocity, expected.cls_velocity)
        assert vars(Interpolant.of_run(saved_settings(content, file))) == vars(run.facts.path)


def in_one_process_group() -> None:
    """Have the runs of this process use one process group, which a run ends otherwise."""
    torch.distributed.destroy_process_group = lambda *_: None
    save_time()


def test_two_processes_equal_one_and_shards_equal_replicas_bit_for_bit(matrix, tmp_path):
    """The sharded run resumes from the first checkpoint of the replicated one, and recomputes its activations.

    Norms of gradients are sums in another order. Muon multiplies shards in bfloat16.
    """
    cases = [case for case in OPTIONS if case not in WITH_MUON or hasattr(torch.optim, "Muon")]
    shards = hasattr(torch.cpu.Stream, "record_event")  # else this torch shards on GPUs only
    runs = []
    for case in cases:
        runs.append(matrix.flags(case, "ddp"))
        sharded = ["--fsdp", "--activation-checkpointing", *LAST_ONLY, "--resume", str(matrix.file(case, "ddp", 1))]
        runs += [matrix.flags(case, "fsdp", *sharded)] * shards
    *earlier, last = runs
    training = Training(last, tmp_path / "output.txt", 2, in_one_process_group, earlier)
    for case in cases:
        matrix.alone(case)
    assert training.wait(seconds=400) == 0, training.text()
    wrong = {}
    for case in cases:
        try:
            assert_close(matrix.file(case, "alone"), matrix.file(case, "ddp"), 1e-3 if case in WITH_MUON else 1e-5)
            if shards:
                tolerance = 1e-3 if case in WITH_MUON else 0.0
                assert_close(matrix.file(case, "ddp"), matrix.file(case, "fsdp"), tolerance, "grad_norm")
        except AssertionError as error:
            wrong[case] = str(error)
    assert not wrong, wrong


CHANGED = {
    "norm": ("--norm layer", "--norm is layer, but .* was started with rms"),
    "qk-norm": ("--qk-norm layer", "--qk-norm is layer, but .* was started with rms"),
    "rope": ("--no-rope", "--rope is False, but .* was started with True"),
    "value-residual": ("--no-value-residual", "--value-residual is False, but .* was started with True"),
    "sprint": (
        "--no-sprint --sprint-keep 0.25 --sprint-path-drop 0.05",
        "--sprint is False, but .* was started with True",
    ),
    "keep": ("--sprint-keep 0.6", r"--sprint-keep is 0\.6, but .* was started with 0\.5"),
    "drop": ("--sprint-path-drop 0", r"--sprint-path-drop is 0\.0, but .* was started with 0\.5"),
    "latents": ("--model SiT-B/1", "--model is SiT-B/1, but .* was started with SiT-S/1"),
    "projector": ("--projector mlp", "--projector is mlp, but .* was started with conv"),
    "spatial-norm": ("--spatial-norm 0.5", r"--spatial-norm is 0\.5, but .* was started with 0\.6"),
    "depths": ("--encoder-depth 2", "--encoder-depth is 2, but .* was started with 1,2"),
    "align-stop": ("--align-stop-steps 3", "--align-stop-steps is 3, but .* was started with 2"),
    "mean": ("--time-mean 0", r"--time-mean is 0\.0, but .* was started with -0\.2"),
    "times": ("--time-shift 2", r"--time-shift is 2\.0, but .* was started with 0\.4330"),
    "cfm": ("--cfm-coeff 0", r"--cfm-coeff is 0\.0, but .* was started with 0\.05"),
    "cls-lead": ("--cls-lead 0", r"--cls-lead is 0\.0, but .* was started with 0\.3"),
    "muon": ("--optimizer adamw", "expected 1, of AdamW, by --optimizer adamw"),
}
CASE_OF = {"keep": "sprint", "drop": "sprint", "spatial-norm": "projector", "mean": "times"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=has_muon if name in WITH_MUON else ()) for name in CHANGED])
def test_a_resumed_run_keeps_the_option(matrix, name):
    (more, text), case = CHANGED[name], CASE_OF.get(name, name)
    matrix.alone(case)
    refused(matrix, case, text, "--resume", str(matrix.file(case, "alone", 1)), *more.split())


NONSENSE = {
    "rope and odd heads": ("rope", "--hidden-size 20", "rope: the width of a head, 10, is not a multiple of 4"),
    "values of one block": ("value-residual", "--depth 1", "--value-residual with --depth 1: .* needs 2 or more"),
    "sprint and few blocks": ("sprint", "--depth 4", "sprint with a depth of 4 blocks: needs 5 or more"),
    "sprint and depth": ("sprint", "--encoder-depth 3", r"encoder_depth 3 is one of the routed blocks 3 \.\. 3 of"),
    "sprint and depths": ("sprint", "--encoder-depth 1,3", r"encoder_depth 3 is one of the routed blocks 3 \.\. 3 of"),
    "sprint and few tokens": ("sprint", "--sprint-keep 0.01", "sprint_keep 0.01 of 17 tokens keeps none"),
    "patches of 4 x 4": (
        "latents", "--model SiT-S/8", "--model SiT-S/8: latents of 4 x 4 do not divide into patches of 8"
    ),
    "draws of 3 channels": ("latents", "--latents-codec pixel", r"shape \(32, 4, 4\); allowed for codec pixel"),
    "no such latents": ("latents", "--latents-folder vae-sd", r"folders of other names: .*vae-in; choose one by "),
    "projector": ("projector", "--proj-coeff 0", "--projector conv: changes the alignment, and --proj-coeff 0 means"),
    "no encoder": ("projector", "--enc-type none --no-cls-token", "--projector conv: .*, and --enc-type none means"),
    "norm": (
        "norm", "--spatial-norm 0 --enc-type none --no-cls-token", "--spatial-norm 0.0: .*, and --enc-type none means"
    ),
    "depths": ("depths", "--depth 1", r"encoder_depth 2 is outside 1 \.\. 1, the number of blocks"),
    "stop": ("align-stop", "--proj-coeff 0", "--align-stop-steps 2: changes the alignment, and --proj-coeff 0 means"),
    "times": ("times", "--weighting uniform", "--time-mean -0.2: has no effect without --weighting lognormal"),
    "one sample": ("cfm", "--batch-size 1", "--cfm-coeff 0.05: needs an even number of samples in each micro-batch"),
    "means of patches": (
        "standardized", "--entangle patch-mean", "--standardize-cls tokens: .* the class slot holds patch-mean; allowed"
    ),
    "no class slot": ("standardized", "--no-cls-token", "--standardize-cls tokens: .* holds none; allowed: --entangle"),
    "no statistics": (
        "standardized", "--standardize-cls other", "--standardize-cls other: expected one folder or .zip .* found none"
    ),
    "odd micro-batches": (
        "cfm", "--batch-size 6 --gradient-accumulation-steps 2", "--batch-size 6 on 1 processes in .* 2 gives 3"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NONSENSE)
def test_what_makes_no_sense_is_refused_by_name(matrix, name):
    case, more, text = NONSENSE[name]
    refused(matrix, case, text, *more.split())


def refused(matrix, case, text, *more):
    reset_accelerate()
    with pytest.raises(InputError, match=text):
        train.set_up(train.parse_args(matrix.flags(case, "refused", *more)))
    assert not (matrix.folder / "exps" / f"{case}-refused").exists()
