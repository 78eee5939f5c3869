import torch

from models import ema
from tests.test_sit import randomise, small


def test_ema_follows_its_formula():
    model = randomise(small())
    average = ema.averaged_copy(model)
    before = {name: p.clone() for name, p in average.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0) if p.requires_grad else None
    ema.update(average, model, 0.9)
    for (name, p), q in zip(average.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * q)
    assert not any(p.requires_grad for p in average.parameters()) and not average.training


def test_a_skipped_step_changes_nothing():
    model = randomise(small())
    average = ema.averaged_copy(model)
    before = [p.clone() for p in average.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update(average, model, 0.9, good=torch.tensor(0.0))
    assert all(torch.equal(p, q) for p, q in zip(average.parameters(), before, strict=True))
    expected = ema.averaged_copy(average)
    ema.update(expected, model, 0.9)
    ema.update(average, model, 0.9, good=torch.tensor(1.0))
    for p, q in zip(average.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)
