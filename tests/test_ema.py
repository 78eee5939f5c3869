import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from models import ema
from tests.test_sit import randomise, small


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Return the average of a network that has been trained further since."""
    average = ema.averaged_copy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p)) if p.requires_grad else None
    return average


def copies(network: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def equal(network: torch.nn.Module, tensors: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(network.parameters(), tensors, strict=True))


def operations(network: torch.nn.Module) -> list[str]:
    """Return the operations that an update dispatches."""
    seen = []

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    average, good = moved(network), torch.tensor(1.0)
    with Dispatched():
        ema.update(average, network, 0.9, good)
    return seen


def test_ema_follows_its_formula():
    model = randomise(small())
    average = moved(model)
    before, weights = copies(average), copies(model)
    ema.update(average, model, 0.9)
    for p, old, q in zip(average.parameters(), before, weights, strict=True):
        torch.testing.assert_close(p, 0.9 * old + 0.1 * q)
    assert equal(model, weights)
    assert not any(p.requires_grad for p in average.parameters()) and not average.training


@pytest.mark.parametrize("decay", [0.9999, 0.99, 0.75])
def test_ema_on_a_cpu_has_the_bits_of_an_interpolation(decay):
    model = randomise(small())
    average = moved(model)
    expected = [torch.lerp(p, q, 1 - decay) for p, q in zip(copies(average), copies(model), strict=True)]
    ema.update(average, model, decay, good=torch.tensor(1.0))
    assert equal(average, expected)


def test_a_skipped_step_changes_nothing():
    model = randomise(small())
    average = moved(model)
    before = copies(average)
    ema.update(average, model, 0.9, good=torch.tensor(0.0))
    assert equal(average, before)
    ema.update(average, model, 0.9, good=torch.tensor(1.0))
    assert not equal(average, before)


def test_an_update_has_one_operation_for_all_tensors():
    few, many = operations(small(depth=2)), operations(small(depth=8))
    assert few == many and few.count("aten._fused_sgd_.default") == 1 and len(few) <= 3, few


def test_a_shard_without_numbers_is_allowed():
    model = torch.nn.ParameterList([torch.zeros(0, 4), torch.ones(3)])
    average = torch.nn.ParameterList([torch.zeros(0, 4), torch.zeros(3)])
    ema.update(average, model, 0.75, good=torch.tensor(1.0))
    assert average[1].tolist() == [0.25] * 3


@pytest.mark.gpu
def test_an_update_on_a_gpu_has_few_kernels_and_the_numbers_of_a_cpu():
    model = randomise(small(depth=12))
    average = moved(model)
    model_on_gpu, average_on_gpu = (ema.averaged_copy(network).cuda() for network in (model, average))
    good = torch.ones((), device="cuda")
    ema.update(average, model, 0.9, torch.tensor(1.0))
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        ema.update(average_on_gpu, model_on_gpu, 0.9, good)
    kernels = sum(event.count for event in profiler.key_averages())
    assert 1 <= kernels < len(list(model.parameters())) / 4, kernels
    for p, q in zip(average.parameters(), average_on_gpu.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu())
    before = copies(average_on_gpu)
    ema.update(average_on_gpu, model_on_gpu, 0.9, good * 0)
    assert equal(average_on_gpu, before)
