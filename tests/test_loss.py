import pytest
import torch
import torch.nn.functional as F

from loss import REGLoss, TrainingNoise, alignment, alignment_target
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
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(N, C, H, H, generator=g), "y": torch.zeros(N, dtype=torch.int64),
        "cls_token": torch.randn(N, D, generator=g), "t": torch.rand(N, generator=g),
        "noise": torch.randn(N, C, H, H, generator=g), "cls_noise": torch.randn(N, D, generator=g),
    }  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_terms_written_out(path):
    """Every term against the formulas of the paper, sample by sample."""
    model, b, targets = Recorder(), batch(), torch.randn(N, 1 + T, W)
    interpolant = Interpolant(path)
    terms = REGLoss(interpolant, proj_coeff=0.5, cls_coeff=0.03)(model, **b, encoder_tokens=[targets])
    for i in range(N):
        at = interpolant.coefficients(b["t"][i])
        target = at.d_alpha_t * b["x"][i] + at.d_sigma_t * b["noise"][i]
        cls_target = at.d_alpha_t * b["cls_token"][i] + at.d_sigma_t * b["cls_noise"][i]
        cosines = [
            torch.dot(z, y) / z.norm() / y.norm() for z, y in zip(model.projected[0][i], targets[i], strict=True)
        ]
        torch.testing.assert_close(terms.denoise[i], ((model.velocity[i] - target) ** 2).mean())
        torch.testing.assert_close(terms.cls[i], ((model.cls_velocity[i] - cls_target) ** 2).mean())
        torch.testing.assert_close(terms.proj[i], -sum(cosines) / len(cosines))
    torch.testing.assert_close(terms.total, terms.denoise + 0.5 * terms.proj + 0.03 * terms.cls)
    at = interpolant.coefficients(b["t"][:, None])
    torch.testing.assert_close(model.cls_token, at.alpha_t * b["cls_token"] + at.sigma_t * b["cls_noise"])
    assert torch.equal(model.t, b["t"])


def test_repa_and_sit_are_the_same_loss_with_less():
    model, b = Recorder(), batch()
    b.pop("cls_token"), b.pop("cls_noise")
    targets = torch.randn(N, 1 + T, W)
    repa = REGLoss(Interpolant())(model, **b, encoder_tokens=[targets])
    assert repa.cls is None and list(repa.named()) == ["loss", "denoise", "proj"]
    sit = REGLoss(Interpolant())(model, **b)
    assert not model.project and torch.equal(sit.total, sit.denoise)


def test_several_encoders_are_averaged():
    model = Recorder(widths=(W, 7))
    targets = [torch.randn(N, 1 + T, W), torch.randn(N, 1 + T, 7)]
    both = alignment(model.projected, targets)
    each = [alignment([p], [t]) for p, t in zip(model.projected, targets, strict=True)]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


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


def test_times_and_noise_are_drawn_where_not_given():
    torch.manual_seed(0)
    model, b = Recorder(), batch()
    for name in ("t", "noise", "cls_noise"):
        b.pop(name)
    REGLoss(Interpolant())(model, **b)
    first = model.x, model.cls_token, model.t
    REGLoss(Interpolant())(model, **b)
    assert all(not torch.equal(a, z) for a, z in zip(first, (model.x, model.cls_token, model.t), strict=True))
    assert F.mse_loss(first[0], b["x"]) > 0


def test_training_noise_is_cut_by_rows_and_repeats():
    def draw():
        generator = torch.Generator().manual_seed(3)
        return TrainingNoise.draw(generator, 8, (C, H, H), D, Interpolant(), label_drop_prob=0.5)

    whole, again = draw(), draw()
    parts = [whole.rows(0, 3), whole.rows(3, 8)]
    for name in ("t", "noise", "cls_noise", "latent_noise", "label_drop"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(again, name))
    assert whole.label_drop.any() and not whole.label_drop.all()
    assert not torch.equal(whole.noise, whole.latent_noise)
    assert TrainingNoise.draw(torch.Generator(), 2, (C, H, H), None, Interpolant()).rows(0, 1).cls_noise is None
