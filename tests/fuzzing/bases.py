"""Valid files that the harness damages: images, data sets, checkpoints, exports, a codec, references."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from models import ema
from models.autoencoder import PixelCodec
from models.checkpoint import save_checkpoint
from models.sit import SiT
from tests.adm_standin import attribute, blob, number
from tests.conftest import ENCODER_OPTIONS, RESOLUTION, write_data
from training.config import TrainConfig

NETWORK = {
    "input_size": 8, "in_channels": 3, "hidden_size": 8, "depth": 1, "num_heads": 2, "num_classes": 3,
    "encoder_depth": 1, "z_dims": [8], "projector_dim": 8, "cls_token_dim": 8,
}  # fmt: skip
ENCODER_RECORD = {"name": "x", "weights": "ab" * 32}
GRAPH_SHAPES = {"conv/weights": (3, 3, 2, 4), "conv/gamma": (4,)}


def encoded(kind: str, seed: int = 0, side: int = 24) -> bytes:
    """Return an image file of a format of Pillow."""
    ramp, rng = np.linspace(0, 200, side), np.random.default_rng(seed)
    pixels = ramp[:, None, None] + ramp[None, :, None] * [0.2, 0.1, 0] + rng.integers(0, 9, (side, side, 3))
    image, buffer = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), io.BytesIO()
    options = {"TIFF": {"compression": "tiff_lzw"}, "WEBP": {"lossless": bool(seed)}}.get(kind, {})
    (image.quantize(16) if kind == "GIF" else image).save(buffer, kind, **options)
    return buffer.getvalue()


def zip_file(seed: int = 0) -> bytes:
    """Return a zip with stored and deflated members, and a dataset.json."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(3):
            method = zipfile.ZIP_STORED if i else zipfile.ZIP_DEFLATED
            archive.writestr(zipfile.ZipInfo(f"00000/img{i:08d}.png"), encoded("PNG", seed + i), method)
        labels = [[f"00000/img{i:08d}.png", i] for i in range(3)]
        archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": labels}))
    return buffer.getvalue()


def destination(seed: int = 0) -> bytes:
    """Return what preprocessing programs read of their earlier output: its settings in a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo(".convert.json"), json.dumps({"resolution": 8, "seed": seed}))
    return buffer.getvalue()


def write_data_zip(folder: Path, _: int = 0) -> None:
    """Write a data set whose images are in a zip."""
    write_data(folder, num=4, resolution=8)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for path in sorted((folder / "images").rglob("*.*")):
            archive.writestr(zipfile.ZipInfo(path.relative_to(folder / "images").as_posix()), path.read_bytes())
    shutil.rmtree(folder / "images")


def npy(seed: int = 0, shape: tuple[int, ...] = (6, 4, 4)) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(seed).normal(size=shape).astype(np.float32))
    return buffer.getvalue()


def network(seed: int = 0) -> SiT:
    """Return a network without zero weights."""
    torch.manual_seed(seed)
    model = SiT(**NETWORK)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def checkpoint(seed: int = 0) -> dict[str, Any]:
    """Return the content of a checkpoint of a run after a step."""
    model = network(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TrainConfig.learning_rate)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * 0.01 if parameter.requires_grad else None
    optimizer.step()
    codec = PixelCodec().format.to_json()
    args = {"num_heads": 2, "encoder_depth": 1, "exp_name": "x", "path_type": "linear", "codec": codec, "resolution": 8}
    return {
        "model": model.state_dict(), "ema": ema.averaged_copy(model).state_dict(), "opt": optimizer.state_dict(),
        "args": argparse.Namespace(**args), "steps": 1, "network": model.config.to_json(),
        "classes": {"labels": [0, 1, 2], "names": ["a", "b", "c"]},
    }  # fmt: skip


def checkpoint_file(seed: int = 0, zipped: bool = True) -> bytes:
    """Return a file of a checkpoint in the present or the older format of torch.save."""
    buffer = io.BytesIO()
    torch.save(checkpoint(seed), buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def write_export(path: Path, seed: int = 0) -> None:
    from export import export

    source = path.parent / "of-export.pt"
    save_checkpoint(source, checkpoint(seed))
    export(source, path)
    for file in path.parent.glob("of-export.pt*"):
        file.unlink()


def write_encoder(path: Path, seed: int) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    network = timm.create_model("vit_tiny_patch16_224", img_size=RESOLUTION, num_classes=0, **ENCODER_OPTIONS)
    (save_file if path.suffix == ".safetensors" else torch.save)(network.state_dict(), path)


def write_codec(folder: Path, seed: int = 0) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    sizes = {"block_out_channels": [4], "norm_num_groups": 2, "latent_channels": 2, "layers_per_block": 1}
    AutoencoderKL(**blocks, **sizes).save_pretrained(folder)


def graph(seed: int = 0) -> bytes:
    """Return a small TensorFlow graph with two constants and a switch."""
    rng = np.random.default_rng(seed)
    nodes = []
    for name, shape in GRAPH_SHAPES.items():
        value = attribute("tensor", (1, shape, rng.normal(size=shape).astype(np.float32)))
        nodes.append(blob(1, blob(1, name) + blob(2, "Const") + blob(5, blob(1, "value") + blob(2, value))))
    switch = blob(5, blob(1, "scale_after_normalization") + blob(2, attribute("b", 1)))
    nodes.append(blob(1, blob(1, "conv/batchnorm") + blob(2, "BatchNorm") + switch))
    return b"".join(nodes) + blob(4, number(1, 8))


def port(seed: int = 0) -> bytes:
    """Return a small file in the form of the PyTorch port of Inception."""
    buffer = io.BytesIO()
    torch.manual_seed(seed)
    torch.save(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).state_dict(), buffer)
    return buffer.getvalue()


def npz(seed: int = 0, compressed: bool = False) -> bytes:
    """Return samples, and statistics of an encoder."""
    rng, buffer = np.random.default_rng(seed), io.BytesIO()
    arrays = {
        "arr_0": rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8), "mu_enc": rng.normal(size=6),
        "sigma_enc": np.eye(6) + seed, "encoder": np.array("timm/x"), "num_images": np.array(5),
    }  # fmt: skip
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def checksums(seed: int = 0) -> bytes:
    return "".join(f"{i + seed:064x}  file{i}\n" for i in range(4)).encode()


def tar(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("a.png", "a.cls", "b/c.png"):
            info, data = tarfile.TarInfo(name), encoded("PNG", seed)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def metrics(seed: int = 0) -> bytes:
    rows = [{"step": n, "loss": 1 / n + seed, "fid": 9.0, "seconds": 0.5} for n in range(1, 6)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_rewind(folder: Path, seed: int = 0) -> None:
    """Write what going back to an earlier step of a run reads."""
    (folder / "checkpoints").mkdir()
    (folder / "rewind.json").write_text(json.dumps({"step": 2, "number": 1 + seed}) + "\n")
    (folder / "metrics.jsonl").write_bytes(metrics(seed))
    (folder / "checkpoints" / "temporary.json").write_text(json.dumps(["0000001.pt", "0000003.pt"]) + "\n")
