"""The independent judge: a small convolutional classifier, trained on images that no compared network learns from.

It provides neither class tokens nor alignment targets. Methods are compared by the Frechet distance in its features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError
from common.images import decode_rgb
from common.progress import progress_bar
from common.sources import FileSource, label_entries, read_dataset_json
from common.temporary import atomic_write
from models.weights_file import read_weights_file

BATCH_SIZE = 128
LEARNING_RATE = 2e-3
SEED = 0


class Judge(nn.Module):
    """A plain convolutional classifier. Each stage has two convolutions and halves the size.

    Args:
        size: images are reduced to this side in px.
        widths: channels of the stages. The last is the number of features.
        classes: number of classes.
    """

    def __init__(self, size: int, widths: list[int], classes: int):
        super().__init__()
        self.config = {"size": size, "widths": widths, "classes": classes}
        layers: list[nn.Module] = []
        for before, width in zip([3, *widths], widths, strict=False):
            for channels in (before, width):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.stages = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)
        self.width = widths[-1]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, D) and logits (N, K) of images (N, 3, H, W), uint8 0-255 or float of that range."""
        pixels = reduced(images, self.config["size"]) / 127.5 - 1
        features = self.stages(pixels).mean(dim=(2, 3))
        return features, self.head(features)


def reduced(images: Tensor, size: int) -> Tensor:
    """Return images (N, 3, H, W) of any dtype at `size` px, float32 0-255, by averaging over areas."""
    return F.interpolate(images.float(), (size, size), mode="area")


def train_judge(
    dest: Path, images: Tensor, labels: Tensor, size: int, widths: list[int], steps: int, device: str = "cpu"
) -> None:
    """Train a judge on images (N, 3, H, W) uint8 with labels (N,), and write it to `dest`."""
    torch.manual_seed(SEED)
    small = torch.cat([reduced(part, size) for part in images.split(BATCH_SIZE)])
    judge = Judge(size, widths, int(labels.max()) + 1).to(device)
    train_on_images(
        judge.parameters(),
        lambda batch, rows: F.cross_entropy(judge(batch)[1], labels[rows].to(device)),
        small,
        steps,
        "judge",
        device,
    )
    with atomic_write(dest) as file:
        torch.save({"config": judge.config, "weights": judge.state_dict()}, file)


def train_on_images(
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    steps: int,
    name: str,
    device: str = "cpu",
) -> None:
    """Minimise a loss on randomly transformed images.

    Args:
        loss_of: transformed images (B, C, R, R) on `device`, and their rows in `images` (B,), to the loss.
        images: (N, C, R, R) float32, on the CPU; channels after the colours are transformed with them.
        name: shown in the progress bar.
    """
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    for step in (bar := progress_bar(range(steps), desc=f"training the {name}", unit="step")):
        rows = torch.randint(len(images), (BATCH_SIZE,))
        loss = loss_of(transformed(images[rows]).to(device), rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def transformed(images: Tensor) -> Tensor:
    """Return images (N, C, R, R), each rotated, scaled and shifted by small random amounts."""
    n = len(images)
    angle, scale = (torch.rand(n) - 0.5) * 0.5, 1 + (torch.rand(n) - 0.5) * 0.3
    cos, sin = angle.cos() / scale, angle.sin() / scale
    shift = (torch.rand(n, 2) - 0.5) * 0.3
    maps = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def load_judge(path: Path, device: str | torch.device = "cpu") -> Judge:
    """Return a trained judge, frozen. Raises InputError if `path` does not exist or is not a judge's file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; convergence.py makes it")
    saved = read_weights_file(path)
    try:
        judge = Judge(**saved["config"])
        judge.load_state_dict(saved["weights"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path}: not the file of a judge; convergence.py makes it") from error
    return judge.to(device).eval().requires_grad_(False)


def load_images(folder: Path, resolution: int | None = None) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, R, R) uint8 and labels (N,) of a folder with dataset.json.

    Raises:
        InputError: the folder has no labels, or an image is not RGB of `resolution` (None: that of the first) px.
    """
    source, images = FileSource(folder), []
    entries = label_entries(read_dataset_json(source), source.describe("dataset.json"))
    if not entries:
        raise InputError(f"{folder}: no dataset.json with labels")
    for name, _ in entries:
        try:
            images.append(decode_rgb(source.read(name), resolution))
        except InputError as error:
            raise InputError(f"{source.describe(name)}: {error}") from error
        resolution = len(images[0])
    pixels = torch.from_numpy(np.stack(images))
    return pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in entries])
