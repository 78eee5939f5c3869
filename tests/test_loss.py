import pytest
import torch

import loss
from loss import Draws, REGLoss, Targets, Term, alignment, alignment_target
from models.interpolant import PATHS, Interpolant

N, C, H, D, T, W = 3, 4, 8, 6, 16, 10


class Recorder:
    """A network that notes what it is called with and returns fixed outputs."""

    def __init__(self, widths=(W,)):
        generator = torch.Generator().manual_seed(0)
        self.velocity = torch.randn(N, C, H, H, generator=generator)
        self.projected = [torch.randn(N, 1 + T, w, generator=generator) for w in widths]
        self.cls_velocity = torch.randn(N, D, generator=generator)

    def __call__(self, x, t, y, cls_token=None, label_drop=None, project=True):
        self.x, self.t, self.cls_token, self.label_drop, self.project = x, t, cls_token, label_drop, project
        return self.velocity, self.projected if project else None, None if cls_token is None else self.cls_velocity


def batch(seed=1):
    """Return latents, labels, a clean class token and the draws of a step."""
    g = torch.Generator().manual_seed(seed)
    x, cls_token = torch.randn(N, C, H, H, generator=g), torch.randn(N, D, generator=g)
    draws = Draws(
        t=torch.rand(N, generator=g),
        noise=torch.randn(N, C, H, H, generator=g),
        latent_noise=torch.randn(N, C, H, H, generator=g),
        label_drop=torch.tensor([True, False, False]),
        cls_noise=torch.randn(N, D, generator=g),
    )
    return x, torch.zeros(N, dtype=torch.int64), cls_token, draws


@pytest.mark.parametrize("path", PATHS)
def test_terms_written_out(path):
    """Every term against the formulas of the paper, sample by sample."""
    model, targets = Recorder(), torch.randn(N, 1 + T, W)
    x, y, cls_token, draws = batch()
    path = Interpolant(path)
    terms = REGLoss(path)(model, x, y, Targets(cls_token, [targets]), draws)
    assert list(terms) == ["loss", "denoise", "proj", "cls"]
    for i in range(N):
        at = path.coefficients(draws.t[i])
        target = at.d_alpha_t * x[i] + at.d_sigma_t * draws.noise[i]
        cls_target = at.d_alpha_t * cls_token[i] + at.d_sigma_t * draws.cls_noise[i]
        cosines = [
            torch.dot(z, y) / z.norm() / y.norm() for z, y in zip(model.projected[0][i], targets[i], strict=True)
        ]
        torch.testing.assert_close(terms["denoise"][i], ((model.velocity[i] - target) ** 2).mean())
        torch.testing.assert_close(terms["cls"][i], ((model.cls_velocity[i] - cls_target) ** 2).mean())
        torch.testing.assert_close(terms["proj"][i], -sum(cosines) / len(cosines))
    torch.testing.assert_close(terms["loss"], terms["denoise"] + 0.5 * terms["proj"] + 0.03 * terms["cls"])
    at = path.coefficients(draws.t[:, None])
    torch.testing.assert_close(model.cls_token, at.alpha_t * cls_token + at.sigma_t * draws.cls_noise)
    assert torch.equal(model.t, draws.t) and torch.equal(model.label_drop, draws.label_drop)


def test_repa_and_sit_are_the_same_loss_with_fewer_terms():
    model, (x, y, _, draws) = Recorder(), batch()
    repa = REGLoss(Interpolant())(model, x, y, Targets(None, [torch.randn(N, 1 + T, W)]), draws)
    assert list(repa) == ["loss", "denoise", "proj"]
    sit = REGLoss(Interpolant())(model, x, y, Targets(), draws)
    assert not model.project and torch.equal(sit["loss"], sit["denoise"])


def test_weights_of_a_run_replace_those_of_the_terms():
    x, y, cls_token, draws = batch()
    terms = REGLoss(Interpolant(), {"cls": 2.0})(Recorder(), x, y, Targets(cls_token), draws)
    torch.testing.assert_close(terms["loss"], terms["denoise"] + 2 * terms["cls"])


def test_a_term_is_one_entry(monkeypatch):
    """It is computed and weighted; tests of train.py show that it is logged and plotted."""
    norm = Term("norm", "mean |velocity|", 0.1, lambda at: at.velocity.abs().flatten(1).mean(1))
    monkeypatch.setattr(loss, "TERMS", (*loss.TERMS, norm))
    x, y, _, draws = batch()
    model = Recorder()
    terms = REGLoss(Interpolant())(model, x, y, Targets(), draws)
    torch.testing.assert_close(terms["norm"], model.velocity.abs().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(terms["loss"], terms["denoise"] + 0.1 * terms["norm"])


def test_several_encoders_are_averaged():
    model = Recorder(widths=(W, 7))
    targets = [torch.randn(N, 1 + T, W), torch.randn(N, 1 + T, 7)]
    both = alignment(model.projected, targets)
    each = [alignment([p], [t]) for p, t in zip(model.projected, targets, strict=True)]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_several_depths_are_averaged_depth_after_depth():
    model = Recorder(widths=(W, 7, W, 7))
    targets = [torch.randn(N, 1 + T, W), torch.randn(N, 1 + T, 7)]
    each = [alignment([p], [t]) for p, t in zip(model.projected, 2 * targets, strict=True)]
    torch.testing.assert_close(alignment(model.projected, targets), sum(each) / 4)
    with pytest.raises(ValueError, match="3 projectors, but tokens of 2 encoders"):
        alignment(model.projected[:3], targets)


def test_spatial_norm_changes_the_targets_of_patches_only():
    cls, patches = torch.randn(N, W), 3 + 2 * torch.randn(N, T, W)
    target = alignment_target(cls, patches, True, spatial_norm=1.0)
    assert torch.equal(target[:, 0], cls)
    torch.testing.assert_close(target[:, 1:].mean(dim=1), torch.zeros(N, W), rtol=0, atol=1e-5)
    torch.testing.assert_close(target[:, 1:].std(dim=1), torch.ones(N, W))
    none = alignment_target(cls, patches, False, spatial_norm=0.0)
    torch.testing.assert_close(none * patches.std(dim=1, keepdim=True), patches, rtol=1e-4, atol=1e-4)


def test_alignment_of_equal_tokens_is_minus_one_at_any_scale():
    tokens = torch.randn(N, T, W)
    torch.testing.assert_close(alignment([tokens * 3], [tokens]), torch.full((N,), -1.0))


def test_alignment_does_not_overflow_in_half_precision():
    tokens = torch.full((N, T, W), 6e4, dtype=torch.float16)  # squares are beyond float16
    torch.testing.assert_close(alignment([tokens], [tokens]), torch.full((N,), -1.0))


def test_mismatches_are_named():
    with pytest.raises(ValueError, match=r"projected tokens are \(3, 16, 10\), the encoder's \(3, 17, 10\)"):
        alignment([torch.zeros(N, T, W)], [torch.zeros(N, T + 1, W)])
    with pytest.raises(ValueError, match="1 projectors, but tokens of 2 encoders"):
        alignment([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)])


def test_class_token_stands_first_in_the_target():
    cls, patches = torch.randn(N, W), torch.randn(N, T, W)
    target = alignment_target(cls, patches, with_cls=True)
    assert torch.equal(target[:, 0], cls) and torch.equal(target[:, 1:], patches)
    assert torch.equal(alignment_target(cls, patches, with_cls=False), patches)


def test_nothing_is_drawn():
    """The same draws give the same loss, whatever the state of the global generator."""
    x, y, cls_token, draws = batch()
    results = []
    for seed in range(2):
        torch.manual_seed(seed)
        results.append(REGLoss(Interpolant())(Recorder(), x, y, Targets(cls_token), draws)["loss"])
    assert torch.equal(*results)


def test_draws_are_cut_by_rows():
    *_, draws = batch()
    draws = draws._replace(route=torch.rand(3, 5), path_drop=torch.tensor([True]).expand(3))
    parts = [draws.rows(0, 1), draws.rows(1, 3)]
    for name in Draws._fields:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(draws, name))
    assert draws._replace(cls_noise=None).rows(0, 1).cls_noise is None


CFM = 0.05


def pairs(samples=8):
    """Return clean latents, noise, times and velocities of a global batch."""
    g = torch.Generator().manual_seed(5)
    x, noise, velocity = (torch.randn(samples, C, H, H, generator=g) for _ in range(3))
    return x, noise, torch.rand(samples, generator=g), velocity


def with_contrast(path, x, noise, t, velocity, weight=CFM):
    """Return the terms of REG's loss without class token and encoders, from the output of a network."""
    draws = Draws(t, noise, noise, torch.zeros(len(t), dtype=torch.bool))
    return REGLoss(Interpolant(path), {"cfm": weight}).compare(velocity, None, None, x, Targets(), draws)


@pytest.mark.parametrize("path", PATHS)
def test_contrastive_flow_matching_written_out(path):
    """Values and gradients against the formula, with sample 2k for 2k + 1 and 2k + 1 for 2k."""
    x, noise, t, velocity = pairs()
    ours, plain = velocity.clone().requires_grad_(), velocity.clone().requires_grad_()
    at, losses = Interpolant(path).coefficients(t), []
    targets = [at.d_alpha_t[i] * x[i] + at.d_sigma_t[i] * noise[i] for i in range(8)]
    for i in range(8):
        other = targets[i + 1 if i % 2 == 0 else i - 1]
        losses.append(((plain[i] - targets[i]) ** 2).mean() - CFM * ((plain[i] - other) ** 2).mean())
    terms = with_contrast(path, x, noise, t, ours)
    torch.testing.assert_close(terms["loss"], torch.stack(losses), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms["loss"], terms["denoise"] + CFM * terms["cfm"])
    assert list(terms) == ["loss", "denoise", "cfm"] and (terms["cfm"] < 0).all()
    gradients = [
        torch.autograd.grad(total, of)[0]
        for total, of in ((terms["loss"].mean(), ours), (torch.stack(losses).mean(), plain))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_contrastive_flow_matching_does_not_depend_on_the_division_of_the_batch():
    batch = pairs()
    complete = with_contrast("linear", *batch)["loss"]
    for size in (2, 4):
        parts = [
            with_contrast("linear", *(values[first : first + size] for values in batch))["loss"]
            for first in range(0, 8, size)
        ]
        assert torch.equal(torch.cat(parts), complete)
    with pytest.raises(ValueError, match="3 samples do not form pairs"):
        with_contrast("linear", *(values[:3] for values in batch))


def test_without_its_weight_contrastive_flow_matching_is_absent():
    batch = pairs()
    terms = with_contrast("linear", *batch, weight=0.0)
    assert list(terms) == ["loss", "denoise"] and torch.equal(terms["loss"], terms["denoise"])
    odd = with_contrast("linear", *(values[:3] for values in batch), weight=0.0)
    assert torch.equal(odd["loss"], terms["loss"][:3])


def test_compiled_contrastive_flow_matching_is_the_same():
    batch = pairs()
    compiled = torch.compile(with_contrast, backend="aot_eager", fullgraph=True, dynamic=False)("linear", *batch)
    torch.testing.assert_close(compiled, with_contrast("linear", *batch), rtol=1e-6, atol=1e-6)
