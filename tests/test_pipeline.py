import numpy as np
import pytest
import torch

from export import export
from models.autoencoder import PixelCodec
from models.checkpoint import save_checkpoint
from tests.conftest import run_generate
from tests.test_checkpoint import content
from tests.test_sit import randomise, small


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a network of 3 classes on 8 x 8 pixels."""
    saved = content(
        randomise(small(in_channels=3, num_classes=3)).eval(), path_type="cosine", codec=PixelCodec().format.to_json()
    )
    save_checkpoint(tmp_path / "0000012.pt", saved)
    return tmp_path / "0000012.pt"


def test_the_pipeline_makes_the_images_of_generate(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from models.pipeline import REGPipeline

    export(checkpoint, tmp_path / "folder")
    pipeline = REGPipeline.from_pretrained(tmp_path / "folder").to("cpu")
    pipeline.set_progress_bar_config(disable=True)
    more = {"guidance_scale": 2.0, "guidance_interval": (0, 0.85)}
    images = pipeline([0, 1, 2, 0, 1], num_inference_steps=4, seed=3, output_type="np", **more).images
    flags = ["--num-fid-samples", "5", "--label-sampling", "balanced", "--num-steps", "4", "--global-seed", "3"]
    flags += ["--cfg-scale", "2", "--guidance-high", "0.85", "--device", "cpu", "--sample-dir", str(tmp_path)]
    run_generate([*flags, "--ckpt", str(tmp_path / "folder"), "--name", "set"], monkeypatch)
    theirs = np.load(tmp_path / "set" / "samples.npz")["arr_0"]
    assert np.array_equal(images, theirs) and images.std() > 0
    assert pipeline(2, num_inference_steps=2).images[0].size == (8, 8)
    half = pipeline.to(torch.bfloat16)([0, 1, 2, 0, 1], num_inference_steps=4, seed=3, output_type="np", **more).images
    assert 0 < abs(half.astype(int) - images).mean() < 3  # levels of 255
