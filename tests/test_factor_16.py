"""Latents of factor 16 with 32 channels and measured statistics: encoded, trained, sampled, exported, in a pipeline."""

import json

import numpy as np
import pytest
import torch

import export
import train
from common.errors import InputError
from models.checkpoint import load_checkpoint, save_checkpoint
from models.latent_format import LatentFormat
from preprocessing import verify
from tests.conftest import reset_accelerate, run_generate
from tests.test_checkpoint import content
from tests.test_encode import make_images
from tests.test_encode import run as run_encode
from tests.test_sit import randomise, small
from training import summary

pytest.importorskip("diffusers")

SAMPLING = ["--num-fid-samples", "3", "--num-steps", "2", "--label-sampling", "balanced", "--device", "cpu"]


def save_codec(folder, **config):
    """Save a small AutoencoderKL of factor 16 with 32 channels and random weights; by default, without a scale."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(8,) * 5,
        latent_channels=32,
        norm_num_groups=4,
        layers_per_block=1,
        **config,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("store", ["draw", "moments"])
def test_from_images_to_a_pipeline(tmp_path, monkeypatch, store):
    # Encode, and check the data.
    codec, data = save_codec(tmp_path / "codec"), tmp_path / "data"
    make_images(data / "images", 6, resolution=64)
    run_encode(data / "images", data / "vae-in", codec, "--store", store)
    recorded = json.loads((data / "vae-in/dataset.json").read_text())["codec"]
    assert (recorded["channels"], recorded["factor"], len(recorded["scale"])) == (32, 16, 32)
    verify.main([str(data), "--latents-folder", "vae-in", "--workers", "1", "--reconstruct", "0"])

    # Train a SiT with patch size 2, decode a grid.
    flags = f"""--output-dir {tmp_path} --exp-name run --data-dir {data} --latents-folder vae-in --device cpu
        --enc-type none --no-cls-token --proj-coeff 0 --model SiT-S/2 --depth 2 --hidden-size 32 --num-heads 2
        --encoder-depth 1 --batch-size 2 --num-workers 0 --log-steps 1 --max-train-steps 2 --ema-decay 0.5
        --sampling-steps 2 --grid-num-steps 2 --grid-samples 3"""
    reset_accelerate()
    run = train.set_up(train.parse_args(flags.split()))
    assert run.data.stored == store and run.facts.network.in_channels == 32 and run.facts.network.input_size == 4
    assert run.codec.format == run.facts.latent_format == LatentFormat.from_json(recorded)
    assert ("4 x 4, one draw per image" in summary.data(run)) == (store == "draw")
    train.train(run)
    assert len(list((run.folder / "samples").glob("*.png"))) == 2  # a grid, and decoded training images
    checkpoint = run.folder / "checkpoints" / "0000002.pt"
    assert load_checkpoint(checkpoint)["args"].codec == recorded

    # The export contains the codec; its images, and those of the pipeline, are those of the checkpoint.
    from models.pipeline import REGPipeline

    export.export(checkpoint, tmp_path / "export")
    (tmp_path / "codec").rename(tmp_path / "moved")
    run_generate(
        [*SAMPLING, "--ckpt", str(tmp_path / "export"), "--sample-dir", str(tmp_path), "--name", "a"], monkeypatch
    )
    flags = [*SAMPLING, "--ckpt", str(checkpoint), "--vae", str(tmp_path / "moved"), "--sample-dir", str(tmp_path)]
    run_generate([*flags, "--name", "b"], monkeypatch)
    exported, direct = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in "ab")
    pipeline = REGPipeline.from_pretrained(tmp_path / "export")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([0, 1, 2], seed=0, num_inference_steps=2, output_type="np").images
    assert exported.shape == (3, 64, 64, 3) and exported.std() > 0
    assert np.array_equal(exported, direct) and np.array_equal(images, exported.astype(np.float32) / 255)
    pipeline.save_pretrained(tmp_path / "saved")
    again = REGPipeline.from_pretrained(tmp_path / "saved")
    assert again.vae.format.scale == tuple(recorded["scale"]) and again.vae.format.shift == tuple(recorded["shift"])


def test_a_published_checkpoint_of_32_channels_needs_the_codec_by_flag(tmp_path, monkeypatch):
    """Its settings name no codec, and the network has not the channels of Stable Diffusion's latents."""
    from models.pipeline import REGPipeline

    codec, checkpoint = save_codec(tmp_path / "codec", scaling_factor=0.3099), tmp_path / "0000003.pt"
    network = randomise(small(in_channels=32, num_classes=3)).eval()
    saved = content(network)
    assert saved["args"].__dict__.pop("codec", None) is None
    save_checkpoint(checkpoint, saved)
    export.export(checkpoint, tmp_path / "export")
    for path in (checkpoint, tmp_path / "export"):
        flags = [*SAMPLING, "--ckpt", str(path), "--sample-dir", str(tmp_path / "samples"), "--name", path.stem]
        missing = rf"{path}: names no codec for its network of 32 channels; name it with --vae"
        with pytest.raises(InputError, match=missing):
            REGPipeline.from_pretrained(path)
        with pytest.raises(InputError, match=r"--vae pixel has channels 3, but the network of .* has 32"):
            REGPipeline.from_pretrained(path, "pixel")
        run_generate([*flags, "--vae", str(codec)], monkeypatch)
        generated = np.load(tmp_path / "samples" / path.stem / "samples.npz")["arr_0"]
        pipeline = REGPipeline.from_pretrained(path, str(codec))
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline([0, 1, 2], seed=0, num_inference_steps=2, output_type="np").images
        assert pipeline.vae.format.scale == 0.3099 and np.array_equal(images, generated.astype(np.float32) / 255)
