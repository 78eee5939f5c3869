"""A network of standardised class tokens: its statistics in files, conversions and samples."""

import pytest
import torch

from common.errors import InputError
from common.io import read_json
from export import export
from models.autoencoder import PixelCodec
from models.checkpoint import build_model, load_checkpoint, load_model, network_config, save_checkpoint
from models.class_scale import ClassTokenScale
from models.inference import convert
from models.interpolant import Interpolant
from models.sit import SiT, SiTConfig, SiTOutput
from samplers import Guidance, image_seeds, sample_images
from tests.test_checkpoint import content
from tests.test_samplers import trained_looking_network
from tests.test_sit import randomise, small
from training.state import initialize_from

MEAN, STD = torch.linspace(-20, 20, 24), torch.logspace(-3, 2, 24)


def standardized(**options) -> SiT:
    model = randomise(small(standardized_cls=True, **options)).eval()
    width = model.cls_token_dim
    model.cls_scale.load_state_dict({"mean": MEAN[:width], "std": STD[:width]})
    return model


def test_each_direction_is_the_inverse_of_the_other():
    scale = standardized().cls_scale
    tokens = torch.randn(1000, 24) * STD + MEAN
    found = scale.standardize(tokens)
    torch.testing.assert_close(found, (tokens - MEAN) / STD, rtol=0, atol=0)
    torch.testing.assert_close(scale.restore(found), tokens, rtol=1e-6, atol=1e-6)
    assert found.mean(0).abs().max() < 0.2 and (found.std(0) - 1).abs().max() < 0.2
    new = ClassTokenScale(24)
    assert torch.equal(new.standardize(tokens), tokens) and torch.equal(new.restore(tokens), tokens)


def test_without_the_switch_nothing_is_added():
    model = small()
    assert model.cls_scale is None and "standardized_cls" not in model.config.to_json()
    other = small(standardized_cls=True)
    assert other.config.to_json() == {**model.config.to_json(), "standardized_cls": True}
    assert SiTConfig.from_json(other.config.to_json()) == other.config
    names = [name for name, _ in other.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]
    assert other.state_dict().keys() - model.state_dict().keys() == {"cls_scale.mean", "cls_scale.std"}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_without_a_class_token_there_is_nothing_to_standardise():
    for slot in ({"cls_token_dim": None}, {"cls_token_dim": None, "learnable_token": True}):
        with pytest.raises(ValueError, match="standardized_cls: there is no class token"):
            small(standardized_cls=True, **slot)


class OfNormalTokens:
    """The velocity of standard normal class tokens and latents on the linear path: x (2 t - 1) / ((1 - t)^2 + t^2)."""

    def __call__(self, x, t, y, cls_token=None, project=True):
        factor = (2 * t - 1) / ((1 - t) ** 2 + t**2)
        return SiTOutput(x * factor, None, cls_token * factor)


@pytest.mark.parametrize("mode", ["ode", "sde"])
def test_sampled_tokens_are_in_the_units_of_the_encoder(mode):
    model = standardized(input_size=2, in_channels=1, patch_size=1)
    count = 1000
    given = [0] * count, image_seeds(0, range(count)), Interpolant()
    x, tokens = sample_images(model, *given, mode=mode, num_steps=50, network=OfNormalTokens())
    assert tokens.dtype == torch.float64
    bound = 5 / count**0.5
    assert ((tokens.mean(0) - MEAN) / STD).abs().max() < bound
    assert (tokens.std(0) / STD - 1).abs().max() < bound + 0.03  # 0.03: of the solver's steps
    assert abs(x.std() - 1) < bound + 0.03


@pytest.mark.parametrize("sampler", [("ode", "heun"), ("ode", "dopri5"), ("sde", "euler")])
def test_only_the_units_of_the_tokens_differ(sampler):
    """Guidance, padding of a batch and latents are those of the network without the statistics."""
    plain, scaled = trained_looking_network(), trained_looking_network(standardized_cls=True)
    scaled.cls_scale.load_state_dict({"mean": MEAN[:6], "std": STD[:6]})
    given = [0, 3], [5, 6], Interpolant(), Guidance(2.0, 1.5), *sampler
    x, tokens = sample_images(plain, *given, num_steps=4)
    found_x, found = sample_images(scaled, *given, num_steps=4)
    assert torch.equal(x, found_x) and torch.equal(tokens * STD[:6] + MEAN[:6], found)
    if sampler[1] != "dopri5":
        padded = sample_images(scaled, *given, num_steps=4, rows=4)[1]
        torch.testing.assert_close(padded, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_float32(dtype):
    model = convert(standardized(), dtype)
    assert model.dtype == dtype and model.wg_norm.weight.dtype == dtype
    assert torch.equal(model.cls_scale.mean, MEAN) and torch.equal(model.cls_scale.std, STD)
    tokens = sample_images(model, [0], [1], Interpolant(), num_steps=2)[1]
    assert tokens.isfinite().all()


def test_files_keep_the_statistics(tmp_path):
    pytest.importorskip("diffusers")
    from models.pipeline import REGPipeline

    model = standardized(in_channels=3, num_classes=3)
    saved = content(model, codec=PixelCodec().format.to_json())
    with_description = {**saved, "network": model.config.to_json()}
    save_checkpoint(tmp_path / "0000012.pt", with_description)
    save_checkpoint(tmp_path / "0000013.pt", saved)  # without a description
    export(tmp_path / "0000012.pt", tmp_path / "one.safetensors")
    export(tmp_path / "0000012.pt", tmp_path / "folder")
    assert read_json(tmp_path / "folder" / "config.json")["standardized_cls"] is True
    pipeline = REGPipeline.from_pretrained(tmp_path / "folder").to(torch.bfloat16).to(torch.float32)
    pipeline.save_pretrained(tmp_path / "saved")
    networks = [
        load_model(tmp_path / name) for name in ("0000012.pt", "0000013.pt", "one.safetensors", "folder", "saved")
    ]
    for network in (*networks, pipeline.transformer):
        assert network.config == model.config
        assert torch.equal(network.cls_scale.mean, MEAN) and torch.equal(network.cls_scale.std, STD)


WRONG = {
    "no description": (
        lambda file: file["network"].pop("standardized_cls"),
        "network has standardized_cls False, but the weights have True",
    ),
    "no statistics": (
        lambda file: [file["ema"].pop(f"cls_scale.{name}") for name in ("mean", "std")],
        "network has standardized_cls True, but the weights have False",
    ),
    "no std": (lambda file: file["ema"].pop("cls_scale.std"), r"missing: 1 \(cls_scale\.std\)"),
    "only std": (lambda file: file["ema"].pop("cls_scale.mean"), "standardized_cls True, but the weights have False"),
    "width": (lambda file: file["ema"].update({"cls_scale.std": torch.ones(23)}), r"cls_scale\.std \[23\] instead of"),
    "zero": (lambda file: file["ema"]["cls_scale.std"].zero_(), r"cls_scale\.std contains 0; expected numbers above 0"),
    "negative": (lambda file: file["ema"]["cls_scale.std"].neg_(), r"cls_scale\.std contains -100; expected numbers"),
    "not finite": (lambda file: file["ema"]["cls_scale.mean"].fill_(torch.nan), "cls_scale.mean contains numbers that"),
    "no class slot": (
        lambda file: file["network"].update(cls_token_dim=None),
        "network: standardized_cls: there is no class token",
    ),
    "kind": (lambda file: file["network"].update(standardized_cls=1), "its standardized_cls is 1; expected true or"),
}


@pytest.mark.parametrize(("spoil", "text"), WRONG.values(), ids=WRONG)
def test_a_file_that_contradicts_itself_is_refused(spoil, text):
    model = standardized()
    saved = {**content(model), "network": model.config.to_json()}
    spoil(saved)
    with pytest.raises(InputError, match=rf"odd\.pt: .*{text}"):
        build_model(saved, source="odd.pt")


def test_the_description_is_inferred_from_the_names():
    saved = {"args": {"num_heads": 2, "encoder_depth": 2}}
    for model in (standardized(), small()):
        assert network_config({**saved, "ema": model.state_dict()}) == model.config


def test_the_class_slot_of_other_units_is_initialized(tmp_path):
    """The statistics are always those of the new run."""
    slot = ["cls_projectors2.weight", "cls_projectors2.bias", "wg_norm.weight", "wg_norm.bias"]
    slot += ["final_layer.linear_cls.weight", "final_layer.linear_cls.bias"]
    for name, model in (("plain", randomise(small())), ("scaled", standardized())):
        save_checkpoint(tmp_path / name, {**content(model), "network": model.config.to_json()})
    for name, scaled, initial in (
        ("plain", True, slot),
        ("scaled", False, slot),
        ("scaled", True, []),
        ("plain", False, []),
    ):
        model, average = (small(standardized_cls=scaled) for _ in range(2))
        if scaled:
            model.cls_scale.std.fill_(3)
        assert sorted(initialize_from(tmp_path / name, model, average)) == sorted(initial)
        given = load_checkpoint(tmp_path / name)["ema"]
        for key, value in model.state_dict().items():
            fresh = key in initial or key.startswith("cls_scale.")
            expected = value if fresh else given[key]
            assert torch.equal(value, expected)
            assert torch.equal(value, average.state_dict()[key])
        assert not scaled or (model.cls_scale.std == 3).all()
        assert (model.final_layer.linear_cls.weight == 0).all() == bool(initial)
