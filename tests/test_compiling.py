import os
from functools import partial

import pytest
import torch

import train
import training.setup
from common.errors import InputError
from loss import REGLoss
from models import ema
from models.encoders import untrained_encoder
from models.interpolant import Interpolant
from tests.conftest import run_training
from tests.processes import Training
from tests.test_sit import inputs, randomise, small
from tests.test_train import terms, with_flags
from training.parallelism import compile_training, to_device

ENCODER = "timm/vit_tiny_patch16_224:input=64:patch_size=64:depth=1:embed_dim=24:num_heads=2"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_with(monkeypatch, backend: str) -> None:
    """Have train.py's --compile use another backend, which needs no C++ compiler."""
    monkeypatch.setattr("training.setup.compile_training", lambda *parts: compile_training(*parts, backend=backend))


@pytest.mark.parametrize(
    ("backend", "more"),
    [
        ("eager", ""),
        ("eager", "--no-cls-token --enc-type none"),
        ("aot_eager", "--mixed-precision bf16 --activation-checkpointing"),
    ],
)
def test_a_compiled_run_has_the_losses_of_a_plain_one(train_flags, monkeypatch, backend, more):
    compile_with(monkeypatch, backend)
    plain = run_training(with_flags(train_flags, "--exp-name", "plain", *more.split()))
    names = ("loss", "denoise", "grad_norm")
    compiled = run_training(with_flags(train_flags, "--compile", *more.split()))
    tolerance = 2e-2 if "bf16" in more else 1e-5
    torch.testing.assert_close(terms(compiled, *names), terms(plain, *names), rtol=tolerance, atol=tolerance)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


def test_all_blocks_share_one_graph_and_no_step_after_the_first_compiles(train_flags, monkeypatch):
    compile_with(monkeypatch, "eager")
    step, graphs = train.training_step, torch._dynamo.utils.counters["stats"]
    added = []

    def watched(run, batches):
        before = graphs["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=run.step > 0):
            step(run, batches)
        added.append(graphs["unique_graphs"] - before)

    monkeypatch.setattr(train, "training_step", watched)
    for depth in ("2", "4"):
        torch._dynamo.reset()
        run_training(with_flags(train_flags, "--compile", "--depth", depth, "--exp-name", f"depth{depth}"))
    assert len(added) == 8 and added[0] == added[4] > 3
    assert not any(added[1:4] + added[5:])


def test_each_region_is_one_graph():
    network, graphs = randomise(small()), []
    encoder = untrained_encoder(ENCODER, 64, "cpu")

    def backend(graph, given):
        graphs.append(graph)
        return graph

    compile_training(network, [encoder], REGLoss(Interpolant()), backend=backend)
    x, c = torch.randn(2, 17, 32), torch.randn(2, 32)
    regions = ((network.blocks[0], x, c), (network.projectors[0], x), (network.final_layer, x, c, True))
    for number, (region, *given) in enumerate(regions, start=1):
        region(*given)
        assert len(graphs) == number, region
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            encoder.convert(dtype)(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert len(graphs) == len(regions) + 2


def print_graphs() -> None:
    """Have the --compile of this training process print how many operations each graph has, instead of compiling."""

    def backend(graph, given):
        operations = sum(node.op.startswith("call") for node in graph.graph.nodes)
        os.write(1, f"graph of {operations} operations\n".encode())
        return graph

    training.setup.compile_training = partial(compile_training, backend=backend)


def test_ddp_does_not_split_the_graphs(train_flags, tmp_path):
    """A projector has more than 1 MB, after which DDP would split."""
    graphs = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.txt"
        flags = with_flags(train_flags, "--compile", "--projector-dim", "768", "--exp-name", f"on-{processes}")
        process = Training([*flags, "--max-train-steps", "1"], output, processes, print_graphs)
        assert process.wait() == 0, process.text()
        lines = [line for line in process.text().splitlines() if line.startswith("graph of")]
        graphs.append(sorted(lines))
    assert len(graphs[0]) > 3 and graphs[1] == sorted(2 * graphs[0])


def test_compiling_changes_no_name_and_no_average():
    network = randomise(small())
    names = list(network.state_dict())
    compile_training(network, [], REGLoss(Interpolant()), backend="eager")
    assert list(network.state_dict()) == names
    assert ema.averaged_copy(network).blocks[0]._compiled_call_impl is None


def test_generated_code_gives_the_same_block(monkeypatch, tmp_path):
    """The real compiler, on the one region that most of a step goes through; regions are built at their first use."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
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


@pytest.mark.parametrize("variable", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_a_variable_that_would_disable_compiling_is_refused(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(InputError, match=f"environment variable {variable}=1: --compile would do nothing"):
        compile_training(small(), [], REGLoss(Interpolant()))


def test_batches_pass_through_on_a_cpu():
    batches = [(torch.arange(3), torch.ones(2)), (torch.arange(4), torch.zeros(2))]
    taken = list(to_device(iter(batches), torch.device("cpu")))
    pairs = zip(sum(batches, ()), sum(taken, ()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
