"""Options for faster sampling change an image only by rounding."""

import contextlib
from unittest.mock import MagicMock

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.inference import CudaGraphs, compile_blocks, convert, fast_network
from models.interpolant import Interpolant
from samplers import Guidance, sample_images
from tests.test_samplers import SR_DIT, trained_looking_network

GUIDANCE = Guidance(2.0, 2.0, 0.0, 0.5)
PATH_DROP = Guidance(2.0, 2.0, 0.0, 0.5, path_drop=True)
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}  # of a float32 network in batches of other sizes


def images(model, count=3, guidance=GUIDANCE, **options):
    return sample_images(
        model, [n % 5 for n in range(count)], list(range(count)), Interpolant(), guidance, num_steps=4, **options
    )


@pytest.fixture(params=[{}, {"cls_token_dim": None}, {"cls_lead": 0.3}], ids=["class token", "none", "lead"])
def model(request):
    return trained_looking_network(**request.param)


def test_half_precision_keeps_time_and_state(model):
    expected, _ = images(model)
    names = list(model.state_dict())
    model = convert(model, torch.bfloat16)
    assert list(model.state_dict()) == names and model.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (
            torch.float32 if name.startswith(("t_embedder.", "t_cls_embedder.")) else torch.bfloat16
        ), name
    latents, _ = images(model)
    assert latents.dtype == torch.float64
    assert not torch.equal(latents, expected)
    assert (latents - expected).std() < 0.02 * expected.std()


def test_half_precision_distinguishes_consecutive_times(model):
    model = convert(model, torch.bfloat16)
    t = torch.tensor([0.8000, 0.8039])  # one step of 250
    a, b = model.t_embedder(t)
    assert torch.allclose(a - b, (model.t_embedder.float()(t[:1]) - model.t_embedder(t[1:]))[0], atol=1e-6)
    assert not torch.equal(a, b)


def test_compiled_blocks_give_the_same_images_and_are_compiled_once_for_each_shape(model):
    expected = images(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    compile_blocks(model, backend=counter)
    first = images(model)
    compiled = counter.frame_count
    assert 0 < compiled <= 2 * (len(model.blocks) + 1)  # inside and outside the guidance interval
    second = images(model)
    assert counter.frame_count == compiled
    for found in (first, second):
        torch.testing.assert_close(found[0], expected[0])


def test_blocks_are_compiled_once_for_both_branches_of_path_drop_guidance():
    """Both have the batch size of the calls outside the guidance interval."""
    model = trained_looking_network(**SR_DIT)
    expected = images(model, guidance=PATH_DROP)
    torch._dynamo.reset()
    compile_blocks(model, backend=(counter := CompileCounter()))
    torch.testing.assert_close(images(model, guidance=PATH_DROP), expected)
    compiled = counter.frame_count
    assert 0 < compiled <= 3  # the first block, the others, the final layer
    images(model, guidance=PATH_DROP)
    assert counter.frame_count == compiled


class RecordedGraph(TorchDispatchMode):
    """Replacement for a CUDA graph on the CPU: records operations and replays them into the same memory."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, output))
        return output

    def replay(self):
        for operation, args, kwargs, output in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """Record CUDA graphs on the CPU; return the list of the recorded graphs."""
    captured = []

    def capture(graph, pool, capture_error_mode):
        captured.append(graph)
        return graph

    for name, stand_in in {
        "CUDAGraph": RecordedGraph,
        "graph": capture,
        "graph_pool_handle": lambda: None,
        "Stream": MagicMock,
        "current_stream": MagicMock(),
        "stream": contextlib.nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return captured


def check_graphs(model, guidance=GUIDANCE):
    """Compare replayed with direct calls: inside and outside the guidance interval, where batches have other sizes.

    A second batch of a shape, and changed weights, go through the graphs of the first one.
    """
    graphs = CudaGraphs(model)
    for count, shift in ((3, 0), (3, 1), (2, 0), (3, 2)):
        if shift == 2:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
        labels, seeds = [(n + shift) % 5 for n in range(count)], [shift, 7, 8][:count]
        direct, replayed = (
            sample_images(model, labels, seeds, Interpolant(), guidance, num_steps=4, network=network)
            for network in (model, graphs)
        )
        torch.testing.assert_close(replayed, direct, **ROUNDING)


def test_replayed_calls_depend_only_on_their_arguments(model, graphs_on_cpu):
    check_graphs(model)
    assert len(graphs_on_cpu) == 4  # two batch sizes, each inside and outside the guidance interval


def test_a_call_without_the_middle_blocks_has_a_graph_of_its_own(graphs_on_cpu):
    check_graphs(trained_looking_network(**SR_DIT), PATH_DROP)
    assert len(graphs_on_cpu) == 4  # two batch sizes, each with and without the middle blocks


def check_fast_network(model, guidance=GUIDANCE, **tolerance):
    """Compare a batch, a smaller one, and one after a change of the weights, with direct calls of the network."""
    fast = fast_network(model, 3, compiled=model.device.type == "cuda", cuda_graphs=True)
    for change, count in ((0.0, 3), (0.0, 2), (0.5, 2)):
        with torch.no_grad():
            for parameter in model.final_layer.parameters():
                parameter.mul_(1 + change)
        direct, found = images(model, count, guidance), images(model, count, guidance, **fast._asdict())
        assert len(found[0]) == count
        torch.testing.assert_close(found, direct, **{**ROUNDING, **tolerance})


def test_a_smaller_batch_is_padded_and_changed_weights_are_used(model, graphs_on_cpu):
    check_fast_network(model)
    assert len(graphs_on_cpu) == 2  # inside and outside the guidance interval, for both numbers of images


def test_without_compilation_and_graphs_the_network_is_called_as_it_is(model):
    assert fast_network(model, 3, compiled=False, cuda_graphs=False) == (model, 1)
    assert all(block._compiled_call_impl is None for block in model.blocks)


@pytest.mark.gpu
def test_the_fast_network_gives_the_same_images_under_autocast(model):
    with torch.autocast("cuda", torch.float16):
        check_fast_network(model.cuda(), rtol=0.02, atol=0.02)


@pytest.mark.gpu
def test_cuda_graphs_give_the_same_images(model):
    check_graphs(model.cuda())


@pytest.mark.gpu
def test_the_fast_network_gives_the_same_images_with_path_drop_guidance():
    check_graphs(trained_looking_network(**SR_DIT).cuda(), PATH_DROP)
    check_fast_network(trained_looking_network(**SR_DIT).cuda(), PATH_DROP, rtol=1e-3, atol=1e-3)
