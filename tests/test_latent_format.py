"""The format of latents: stored draws, codecs without statistics, and which statistics a config.json gives."""

import json

import pytest
import torch

from common.errors import InputError
from models.autoencoder import CODECS, codec_format, load_codec, load_decoder
from models.latent_format import LatentFormat
from tests.test_autoencoder import random_images, save_kl

MEASURED = LatentFormat("some", channels=2, factor=8, scale=(2.0, 3.0), shift=(0.5, -1.0))


def test_a_stored_draw_gives_the_latents_of_its_moments():
    moments = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).abs()
    noise = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    draw = moments[:, :2] + moments[:, 2:] * noise
    expected = MEASURED.sample(moments, noise)
    assert torch.equal(MEASURED.sample(draw, torch.randn(3, 2, 5, 5)), expected)
    assert torch.equal(MEASURED.sample(draw, None), expected) and not torch.equal(expected, draw)
    assert torch.equal(MEASURED.sample(moments, None), MEASURED.sample(moments[:, :2].contiguous(), None))


def test_latents_without_statistics_are_refused():
    unknown = LatentFormat("some", channels=2, factor=8, scale=None)
    for use in (lambda x: unknown.sample(x, None), unknown.unscale):
        with pytest.raises(InputError, match=r"codec some has no statistics: .*preprocessing/encode\.py measures"):
            use(torch.zeros(1, 2, 4, 4))
    with pytest.raises(InputError, match="scale has the value null"):
        LatentFormat.from_json(unknown.to_json())


@pytest.mark.parametrize(
    "value", [0, 1e-13, 1e13, 1e39, float("nan"), float("inf"), 10**400, True, "2", (1.0, 1e300), (1.0,)]
)
def test_scales_and_shifts_that_no_latents_have_are_refused(value):
    """Finite is not enough: float32 has no 1e39, and a scale of 1e-46 is 0 there."""
    with pytest.raises(InputError, match="codec some: scale has "):
        LatentFormat("some", channels=2, factor=8, scale=value)
    if value not in (0, 1e-13):
        with pytest.raises(InputError, match="codec some: shift has "):
            LatentFormat("some", channels=2, factor=8, shift=value)
    LatentFormat("some", channels=2, factor=8, scale=-0.18215, shift=(0.0, -1.5))


MEAN, STD = [0.25, -0.5, 1.0, 0.0], [0.5, 2.0, 4.0, 1.0]


@pytest.mark.parametrize(
    ("channels", "config", "scale", "shift"),
    [
        (8, {}, None, 0.0),  # diffusers writes scaling_factor 0.18215
        (4, {}, 0.18215, 0.0),
        (8, {"scaling_factor": 0.5, "shift_factor": 0.1}, 0.5, 0.1),
        (4, {"latents_mean": MEAN, "latents_std": STD}, (2.0, 0.5, 0.25, 1.0), tuple(MEAN)),
        (4, {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.5}, (1.0, 0.25, 0.125, 0.5), tuple(MEAN)),
    ],
)
def test_statistics_of_a_config(tmp_path, channels, config, scale, shift):
    folder = save_kl(tmp_path, channels, **config)
    found = codec_format(str(folder))
    assert (found.channels, found.scale, found.shift) == (channels, scale, shift)
    assert found == load_codec(str(folder)).format


def test_a_codec_without_statistics_decodes_with_those_of_the_latents(tmp_path):
    folder = str(save_kl(tmp_path / "codec", 2))
    copy = str(save_kl(tmp_path / "copy", 2))
    codec, images = load_codec(folder), random_images()
    with pytest.raises(InputError, match="has no statistics"):
        codec.decode(torch.zeros(1, 2, 8, 8))
    measured = LatentFormat(folder, channels=2, factor=4, scale=(2.0, 3.0), shift=(0.5, -1.0))
    moments = codec.encode(images)
    expected = codec.autoencoder.decode(moments[:, :2]).sample
    for name in (None, copy):
        decoder = load_decoder(measured, name)
        assert (decoder.format.scale, decoder.format.shift) == (measured.scale, measured.shift)
        decoded = decoder.decode(measured.sample(moments, None))
        assert (decoded - (127.5 * expected + 127.5).clamp(0, 255)).abs().max() <= 1.01
    with pytest.raises(InputError, match="has no statistics"):
        load_decoder(LatentFormat(folder, channels=2, factor=4, scale=None))


def test_another_decoder_uses_measured_statistics_but_a_tiny_one_is_refused(tmp_path):
    from diffusers import AutoencoderTiny

    other = str(save_kl(tmp_path / "other", scaling_factor=0.3))
    one = LatentFormat("some", channels=4, factor=4, scale=0.5)
    assert load_decoder(one, other).format.scale == 0.3
    each = LatentFormat("some", channels=4, factor=4, scale=(1.0, 2.0, 3.0, 4.0))
    assert load_decoder(each, other).format.scale == each.scale
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    widths = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    AutoencoderTiny(**blocks, **widths).save_pretrained(tmp_path / "tiny")
    assert load_decoder(one, str(tmp_path / "tiny")).format.scale == 1.0
    with pytest.raises(InputError, match=r"--vae .*tiny: takes scaled latents, but those of some have a scale"):
        load_decoder(each, str(tmp_path / "tiny"))


def test_the_table_of_codecs():
    assert CODECS["e2e-invae"].source == "REPA-E/e2e-invae-hf" and CODECS["e2e-invae"].scale == 0.3099
    names = {"e2e-sdvae", "e2e-vavae", "e2e-flux-vae", "e2e-sd3.5-vae", "va-vae", "in-vae", "sdxl-vae", "sd3-vae"}
    assert all(CODECS[name].scale is None for name in names | {"flux-vae"})


def test_a_format_with_measured_statistics_survives_json():
    assert LatentFormat.from_json(json.loads(json.dumps(MEASURED.to_json()))) == MEASURED
