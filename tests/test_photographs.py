"""All steps on real photographs with real small networks: crops, TAESD latents, MobileNet tokens, train, generate.

The encoder is a supervised MobileNet, not DINOv2; at 512 px it gives as many tokens of the same width.
"""

import zipfile

import numpy as np
import pytest
from PIL import Image

from dataset import LatentDataset
from preprocessing import convert, encode
from tests.conftest import DEVICE, read_rows, reset_accelerate, run_generate, run_training

ENCODER = "timm/mobilenetv1_100:channel_multiplier=0.75:pad_type=same:bn_eps=0.001:mean=0.5:std=0.5"

pytestmark = pytest.mark.assets


@pytest.fixture
def photographs(assets, tmp_path):
    """Eight photographs of four classes, in class folders."""
    with zipfile.ZipFile(assets / "imagenet_samples.zip") as archive:
        names = [name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg"))]
        for name in names[:8]:
            archive.extract(name, tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(("resolution", "encoder_input"), [(256, 512), (512, 1024)])
def test_from_photographs_to_images(assets, photographs, tmp_path, monkeypatch, resolution, encoder_input):
    data, codec = tmp_path / "data", str(assets / "taesd")
    convert.main(f"--source {photographs} --dest {data}/images --resolution {resolution} --workers 1".split())
    reset_accelerate()
    encode.main(f"--source {data}/images --dest {data}/vae-sd --vae {codec} --workers 0".split())
    dataset = LatentDataset(data)
    assert dataset.latent_size == resolution // 8 and len(dataset) == 8

    weights = assets / "encoder" / "mobilenetv1_075.timm.safetensors"
    flags = (
        f"--output-dir {tmp_path}/exps --exp-name photographs --data-dir {data} --model SiT-S/2 --depth 4"
        f" --device {DEVICE}"
    )
    flags += f" --enc-type {ENCODER}:input={encoder_input} --enc-weights {weights} --batch-size 2 --max-train-steps 2"
    flags += " --log-steps 1 --sampling-steps 2 --grid-samples 2 --grid-num-steps 2 --num-workers 0"
    run = run_training(flags.split())
    assert all(np.isfinite([row["denoise"], row["proj"], row["cls"]]).all() for row in read_rows(run))
    real = Image.open(run / "samples" / "reconstructions.png")
    assert np.array(real).std() > 20  # photographs, not a blank

    checkpoint = run / "checkpoints" / "0000002.pt"
    flags = f"--ckpt {checkpoint} --sample-dir {tmp_path}/samples --name a --num-fid-samples 2 --num-steps 2 --save-cls"
    run_generate(flags.split(), monkeypatch)
    with np.load(tmp_path / "samples" / "a" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (2, resolution, resolution, 3)
    assert np.load(tmp_path / "samples" / "a" / "cls_tokens.npy").shape == (2, 768)
