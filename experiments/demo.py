"""The demo's data, encoder and scores, for demo.sh.

    python experiments/demo.py images  --dest FOLDER                  pictures of solids, in train/ and held_out/
    python experiments/demo.py encoder --images FOLDER --dest encoder.safetensors
    python experiments/demo.py encoder-spec                           the value for train.py --enc-type
    python experiments/demo.py score   --samples FOLDER --encoder encoder.safetensors --images FOLDER
                                       --held-out FOLDER --dest score.json

The encoder, a small residual network, is used in place of DINOv2. It is trained on the pictures that REG is trained on.
Held-out pictures are used for scores only: the classifier is trained on them, and generated pictures are compared with
them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checks import POSITIVE
from common.cli import Config, parse, setting
from common.errors import InputError, run_cli
from common.identity import own_file, own_json
from common.io import check_writable, write_json
from experiments.encoder import check_own_pictures, own_encoder, train_encoder
from experiments.judge import load_images, train_judge
from experiments.scoring import Judges, Scorer
from experiments.solids import RESOLUTION, write_images

# The pictures are enlarged to 48 px, of which the network makes 6 x 6 tokens: as many as SiT has with patches of 4 px.
ENCODER_SPEC = "timm/test_resnet:input=48:mean=0.5:std=0.5:output_stride=8"
JUDGE_WIDTHS, JUDGE_STEPS = [16, 32, 64], 100
NOISE_IMAGES = 1000
OWN_FILES = {
    "encoder": own_encoder(ENCODER_SPEC, RESOLUTION),
    "score": own_json("a score of this program", "images", "cls_tokens_right", "encoder_distance"),
}
OWN_JUDGE = own_file("a judge of this program", start=b"PK", contains=b"stages.0.weight")
REQUIRED_FLAGS = {
    "images": ["dest"],
    "encoder": ["images", "dest"],
    "encoder-spec": [],
    "score": ["samples", "encoder", "images", "held_out", "dest"],
}


@dataclass(frozen=True, kw_only=True)
class Demo(Config):
    """Settings of all commands."""

    command: str = setting("", "images, encoder, encoder-spec or score", flag="command")
    dest: Path | None = setting(None, "folder (images) or file (encoder: .safetensors, score: .json) to write")
    images: Path | None = setting(None, "encoder, score: the pictures to train on, as convert.py makes them")
    held_out: Path | None = setting(None, "score: other pictures, as convert.py makes them")
    steps: int = setting(100, "encoder: training steps", check=POSITIVE)
    samples: Path | None = setting(None, "score: folder of a set of samples, made by generate.py")
    encoder: Path | None = setting(None, "score: weights of the encoder")

    def check_combination(self) -> None:
        if self.command not in REQUIRED_FLAGS:
            raise InputError(f"command {self.command!r}: allowed: {', '.join(REQUIRED_FLAGS)}")
        for name in REQUIRED_FLAGS[self.command]:
            if getattr(self, name) is None:
                raise InputError(f"the command {self.command} requires --{name.replace('_', '-')}")
        if self.command in OWN_FILES:
            inputs = (self.images, self.held_out, self.samples, self.encoder)
            check_writable(self.dest, "--dest", inputs, OWN_FILES[self.command])
        if self.command == "score":
            check_writable(self.judge, "--dest: next to it,", inputs, OWN_JUDGE)
        if self.command == "images":
            check_own_pictures(self.dest)

    @property
    def judge(self) -> Path:
        """The file of the judge, next to the score."""
        return self.dest.with_name("judge.pt")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the commands images, encoder, encoder-spec and score."""
    config = parse(Demo, "Make the data and the encoder of the demo, or score its samples.", argv)
    if config.command == "images":
        for half, name in enumerate(("train", "held_out")):
            write_images(config.dest / name, half)
    elif config.command == "encoder":
        train_encoder(config.dest, ENCODER_SPEC, *load_images(config.images, RESOLUTION), config.steps)
    elif config.command == "encoder-spec":
        print(ENCODER_SPEC)
    else:
        write_score(config)


def score(config: Demo) -> dict[str, float | int | None]:
    """Return scores of generated pictures, a folder of generate.py. The judge is written to the folder of `dest`.

    right: share that the judge, a classifier trained on the held-out pictures, assigns to the requested class.
    cls_tokens_right: share of generated class tokens whose nearest class mean of the encoder's tokens is that of the
        requested class, or None.
    distance, encoder_distance: Frechet distances to the held-out pictures, in the features of the judge and in the
        encoder's class tokens.
    ..._of_real: of the pictures that networks were trained on; ..._of_noise: of uniform noise.
    """
    images, labels = load_images(config.samples / "images", RESOLUTION)
    train_judge(config.judge, *load_images(config.held_out, RESOLUTION), RESOLUTION, JUDGE_WIDTHS, JUDGE_STEPS)
    scorer = Scorer(Judges(config.held_out, config.judge, ENCODER_SPEC, str(config.encoder), "pixel", "cpu"))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (NOISE_IMAGES, *images.shape[1:]), generator=generator, dtype=torch.uint8)

    found = scorer.score_images(images, labels)
    found |= {f"{name}_of_real": value for name, value in scorer.score_images(*load_images(config.images)).items()}
    of_noise = scorer.score_images(noise, torch.zeros(NOISE_IMAGES))
    found |= {f"{name}_of_noise": value for name, value in of_noise.items() if name != "right"}
    tokens_right = None
    if (config.samples / "cls_tokens.npy").exists():
        tokens = torch.from_numpy(np.load(config.samples / "cls_tokens.npy", allow_pickle=False))
        tokens_right = float((torch.cdist(tokens.double(), scorer.centres["class"]).argmin(1) == labels).float().mean())
    return {"images": len(images), "cls_tokens_right": tokens_right, **found}


def write_score(config: Demo) -> None:
    """Write the scores of generated pictures to a file and print them."""
    result = score(config)
    write_json(config.dest, result)
    tokens = result["cls_tokens_right"]
    print(f"pictures classified as requested       {result['right']:6.1%}  (real ones: {result['right_of_real']:.1%})")
    print("class tokens nearest to their class    " + ("  none" if tokens is None else f"{tokens:6.1%}"))
    print(
        f"Frechet distance to held-out pictures  {result['encoder_distance']:6.2f}  "
        f"(real ones: {result['encoder_distance_of_real']:.2f}, noise: {result['encoder_distance_of_noise']:.2f})"
    )


if __name__ == "__main__":
    run_cli(main)
