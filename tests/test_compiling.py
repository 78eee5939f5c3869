import pytest
import torch

import train
from loss import REGLoss
from models import ema
from models.interpolant import Interpolant
from tests.conftest import run_training
from tests.test_sit import inputs, randomise, small
from tests.test_train import terms, with_flags
from training.compiling import compile_training
from training.prefetch import to_device


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_with(monkeypatch, backend: str) -> None:
    """Have train.py's --compile use another backend, which needs no C++ compiler."""
    monkeypatch.setattr("training.setup.compile_training", lambda *parts: compile_training(*parts, backend=backend))


@pytest.mark.parametrize(
    "more", ["", "--no-cls-token --enc-type none", "--mixed-precision bf16 --activation-checkpointing"]
)
def test_a_compiled_run_has_the_losses_of_a_plain_one(train_flags, monkeypatch, more):
    compile_with(monkeypatch, "aot_eager")
    plain = run_training(with_flags(train_flags, "--exp-name", "plain", *more.split()))
    names = ("loss", "denoise", "grad_norm")
    compiled = run_training(with_flags(train_flags, "--compile", *more.split()))
    tolerance = 2e-2 if "bf16" in more else 1e-5
    torch.testing.assert_close(terms(compiled, *names), terms(plain, *names), rtol=tolerance, atol=tolerance)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


def test_all_blocks_share_one_graph_and_no_step_compiles_again(train_flags, monkeypatch):
    """The first two steps may compile; an error is raised if a later one does."""
    compile_with(monkeypatch, "eager")
    graphs = []
    for depth in ("2", "4"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        steps = training_step = train.training_step
        taken = []

        def step(run, batches, taken=taken, training_step=training_step):
            taken.append(run.step)
            with torch._dynamo.config.patch(error_on_recompile=len(taken) > 1):
                before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                training_step(run, batches)
                assert len(taken) == 1 or torch._dynamo.utils.counters["stats"]["unique_graphs"] == before

        with monkeypatch.context() as patch:
            patch.setattr(train, "training_step", step)
            run_training(with_flags(train_flags, "--compile", "--depth", depth, "--exp-name", f"depth{depth}"))
        assert train.training_step is steps and len(taken) == 4
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 3


def test_compiling_changes_no_name_and_no_average():
    network = randomise(small())
    names = list(network.state_dict())
    compile_training(network, [], REGLoss(Interpolant()), backend="eager")
    assert list(network.state_dict()) == names
    assert ema.averaged_copy(network).blocks[0]._compiled_call_impl is None


def test_generated_code_gives_the_same_block():
    """The real compiler, on the one region that most of a step goes through; regions are built at their first use."""
    results = []
    for compiled in (False, True):
        network = randomise(small(depth=1, encoder_depth=1))
        if compiled:
            compile_training(network, [], REGLoss(Interpolant()))
        generator = torch.Generator().manual_seed(0)
        x, c = torch.randn(2, 17, 32, generator=generator), torch.randn(2, 32, generator=generator)
        out = network.blocks[0](x, c)
        out.square().mean().backward()
        results.append([out, *(parameter.grad for parameter in network.blocks[0].parameters())])
    for plain, generated in zip(*results, strict=True):
        torch.testing.assert_close(plain, generated, rtol=1e-4, atol=1e-6)


def test_checkpointed_activations_give_the_same_gradients_to_the_bit():
    gradients = []
    for checkpointing in (False, True):
        model = randomise(small())
        model.activation_checkpointing = checkpointing
        out = model(*inputs(model))
        (out.velocity.square().mean() + sum(p.mean() for p in out.projected or [])).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 10 and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_batches_pass_through_on_a_cpu():
    batches = [(torch.arange(3), torch.ones(2)), (torch.arange(4), torch.zeros(2))]
    taken = list(to_device(iter(batches), torch.device("cpu")))
    pairs = zip(sum(batches, ()), sum(taken, ()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
