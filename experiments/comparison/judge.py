"""The independent judge: a small convolutional classifier, trained on images that no compared network learns from, by
which neither class token nor alignment is made. The Frechet distance in its features is what methods are compared by.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.io import InputError, atomic_write
from experiments.digits import jittered

BATCH_SIZE = 128
LEARNING_RATE = 2e-3
SEED = 0


class Judge(nn.Module):
    """A plain convolutional classifier; each width is a stage of two convolutions that ends in half the size.

    Args:
        size: images are averaged down to this many px.
        widths: channels of the stages; the last is the number of features.
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

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, D) and logits (N, K) of images (N, 3, H, W), uint8 0-255 or the same as float."""
        size = self.config["size"]
        pixels = shrunk(images, size) / 127.5 - 1
        features = self.stages(pixels).mean(dim=(2, 3))
        return features, self.head(features)

    @property
    def width(self) -> int:
        """Number of features."""
        return self.config["widths"][-1]


def shrunk(images: Tensor, size: int) -> Tensor:
    """Return images (N, 3, H, W) of any dtype at `size` px, float32 0-255, each pixel the mean of those it covers."""
    return F.interpolate(images.float(), (size, size), mode="area")


def train_judge(
    dest: Path, images: Tensor, labels: Tensor, size: int, widths: list[int], steps: int, device: str = "cpu"
) -> None:
    """Train a judge on images (N, 3, H, W) uint8 with labels (N,), each time turned and shifted a little; write it."""
    torch.manual_seed(SEED)
    small = torch.cat([shrunk(part, size) for part in images.split(BATCH_SIZE)])
    judge = Judge(size, widths, int(labels.max()) + 1).to(device).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    for _ in tqdm(range(steps), desc="training the judge", unit="step"):
        rows = torch.randint(len(small), (BATCH_SIZE,))
        _, logits = judge(jittered(small[rows]).to(device))
        loss = F.cross_entropy(logits, labels[rows].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    with atomic_write(dest) as file:
        torch.save({"config": judge.config, "weights": judge.state_dict()}, file)


def load_judge(path: Path, device: str | torch.device = "cpu") -> Judge:
    """Return a trained judge, frozen. Raises InputError if there is none at `path`."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; convergence.py makes it")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    judge = Judge(**saved["config"])
    judge.load_state_dict(saved["weights"])
    return judge.to(device).eval().requires_grad_(False)
