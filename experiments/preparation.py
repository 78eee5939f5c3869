"""Data, encoder tokens and judge of a comparison, made once in a folder.

train/images, train/vae-sd, train/tokens   the half that networks are trained on, its latents and encoder tokens
held_out/images                            the other half
judge.pt                                   a classifier trained on the held-out half
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import uses_cuda
from common.errors import InputError
from common.io import parse_json
from common.sources import FileSource
from common.temporary import atomic_write
from experiments import digits, solids
from experiments.encoder import train_encoder
from experiments.judge import load_images, train_judge
from experiments.scoring import Judges
from models.encoders import load_encoders

if TYPE_CHECKING:
    from experiments.convergence import Convergence

ROOT = Path(__file__).resolve().parents[1]
TOKENS = "tokens"  # folder of the encoder's tokens, next to the latents
NUM_TOKENS = 64  # of latents and encoder, for data from --source
DIGITS_ENCODER_STEPS = (400, 40)  # of the encoder, and of a worse one for the ablation
# The preset solids: pictures of a class to train on, and held out; the encoder has 36 tokens for a picture.
SOLIDS_PER_CLASS = (1200, 250)
SOLIDS_ENCODER_SPEC = "timm/test_resnet:input=48:mean=0.5:std=0.5:output_stride=8"
SOLIDS_ENCODER_STEPS = 600
JUDGE_STEPS = 600  # of digits and solids
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png")

# The classes of emoji: the first expression that occurs in the caption, which is the emoji's Unicode name.
SKIN_TONE = re.compile(r" emoji modifier fitzpatrick type-[\d-]+")
EMOJI_CLASSES = {
    "pair": r"handshake|holding hands|heavy black heart (man|woman|adult|kiss)|couple|family|wrestlers|bunny|kiss$"
    r"|leftwards hand|^(man|woman|adult)( man| woman| adult)?( boy| girl| child)+$",
    "hand": r"\b(hands?|fist|fingers?|palms?|thumbs|index|biceps|nail polish|ear|nose|foot|leg|selfie|of the horns)"
    r"( sign)?\b(?!.*(male sign|child$))(?<!one hand)(?<!both hands)",
    "woman": r"female sign|\b(woman|women|princess|girl|bride)\b",
    "man": r"male sign|\b(man|men|prince|boy|tuxedo)\b",
    "person": r"person|adult|child|\bbaby\b|worker|officer|runner|surfer|swimmer|golfer|lifter|cyclist|pedestrian"
    r"|haircut|massage|gesture|guardsman|sleuth|ninja|handball|juggling|superhero|supervillain|mage|fairy|vampire|elf",
    "face": r"(?<!clock )face|smil|grin|\bcat\b|monkey|laughing",
    "symbol": r"sign|symbol|squared|letter|arrow|keycap|digit|triangle|circle|square|heart|mark|button|clock face",
}

Groups = dict[str, list[list[str]]]  # class: groups of its files; the files of a group are in the same half


@dataclass(frozen=True)
class Files:
    """What a preset's `prepare` made: training data, and what scores depend on.

    other_encoders, tokens: flags of the other rows of the encoder ablation, and the folders of their tokens.
    """

    data: Path
    judges: Judges
    other_encoders: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pictures:
    """Data from --source and their judge.

    groups_of: the classes of the files of a source. resolution: of training. judge_size, judge_widths, judge_steps: see
    `train_judge`; --judge-steps replaces the last.
    """

    groups_of: Callable[[FileSource], Groups]
    resolution: int
    judge_size: int
    judge_widths: list[int]
    judge_steps: int


def photograph_groups(source: FileSource) -> Groups:
    """Return the photographs of each class folder, each in a group of its own."""
    groups: Groups = {}
    for name in source.names:
        if name.lower().endswith(IMAGE_ENDINGS):
            groups.setdefault(Path(name).parent.name, []).append([name])
    return groups


def emoji_groups(source: FileSource) -> Groups:
    """Return the emoji of each class in `EMOJI_CLASSES`, and of "object"; skin tones of one emoji are a group.

    Raises InputError if the source has no captions.json with the captions.
    """
    try:
        captions = source.load("captions.json", parse_json)["captions"]
        by_base: dict[str, list[str]] = {}
        for name in source.names:
            if name.lower().endswith(IMAGE_ENDINGS):
                by_base.setdefault(SKIN_TONE.sub("", captions[name]), []).append(name)
    except (KeyError, TypeError, IndexError) as error:
        where = source.describe("captions.json")
        raise InputError(f'{where}: expected {{"captions": {{"NAME.png": "caption", ...}}}} for each image') from error
    groups: Groups = {}
    for base, names in by_base.items():
        groups.setdefault(emoji_class(base), []).append(names)
    return groups


def emoji_class(caption: str) -> str:
    """Return the class of an emoji from its caption without skin tones."""
    found = (name for name, expression in EMOJI_CLASSES.items() if re.search(expression, caption))
    return next(found, "object")


def prepare_digits(folder: Path, config: Convergence) -> Files:
    """Make the digits: one half to train on, with an encoder trained on it; the other with a judge trained on it."""
    _make_data(folder, digits.write_images, digits.RESOLUTION, "pixel")
    good, bad = (folder / f"encoder-{steps}.safetensors" for steps in DIGITS_ENCODER_STEPS)
    encoders = list(zip((good, bad), DIGITS_ENCODER_STEPS, (TOKENS, f"{TOKENS}-bad"), strict=True))
    for weights, steps, name in encoders if config.ablation == "encoder" else encoders[:1]:
        if not weights.exists():
            digits.train_encoder(weights, steps)
        _make_tokens(folder, name, digits.ENCODER_SPEC, str(weights))
    _make_judge(folder, digits.RESOLUTION, [32, 64, 64], config.judge_steps or JUDGE_STEPS)
    device = "cuda" if config.device == "cuda" else "cpu"
    judges = judges_of(folder, digits.ENCODER_SPEC, str(good), "pixel", device)
    other = f"encoder of {DIGITS_ENCODER_STEPS[1]} steps"
    return Files(folder / "train", judges, {other: f"--enc-weights {bad}"}, {other: f"{TOKENS}-bad"})


def prepare_solids(folder: Path, config: Convergence) -> Files:
    """Render solids; train an encoder to classify the first half and to predict how its pictures were rendered.

    The class token then says more than the label: pose, light and colours. The patch tokens say which part of the solid
    is where.
    """
    per_class = [min(count, config.images or count) for count in SOLIDS_PER_CLASS]
    device = "cuda" if uses_cuda(config.device) else "cpu"
    _make_data(folder, lambda dest, half: solids.write_images(dest, half, per_class[half]), solids.RESOLUTION, "pixel")
    weights = folder / "encoder.safetensors"
    if not weights.exists():
        images = load_images(folder / "train" / "images")
        shown = solids.factors_of(0, per_class[0]), solids.maps_of(0, per_class[0])
        train_encoder(weights, SOLIDS_ENCODER_SPEC, *images, SOLIDS_ENCODER_STEPS, *shown, device)
    _make_tokens(folder, TOKENS, SOLIDS_ENCODER_SPEC, str(weights))
    _make_judge(folder, solids.RESOLUTION, [32, 64, 64], config.judge_steps or JUDGE_STEPS, device)
    return Files(folder / "train", judges_of(folder, SOLIDS_ENCODER_SPEC, str(weights), "pixel", device))


def prepare_pictures(pictures: Pictures, folder: Path, config: Convergence) -> Files:
    """Split the pictures of --source into halves and convert both; make latents, tokens and judge."""
    if not config.source:
        raise InputError("--source is missing: a folder or zip of pictures")
    if not (folder / "train" / TOKENS / "dataset.json").exists():  # a wrong encoder is named before the work starts
        load_encoders(config.enc_type, pictures.resolution, config.enc_weights, NUM_TOKENS)
    write_half = functools.partial(_extract_half, Path(config.source), pictures.groups_of, limit=config.images)
    _make_data(folder, write_half, pictures.resolution, config.vae)
    _make_tokens(folder, TOKENS, config.enc_type, config.enc_weights)
    device = "cuda" if uses_cuda(config.device) else "cpu"
    steps = config.judge_steps or pictures.judge_steps
    _make_judge(folder, pictures.judge_size, pictures.judge_widths, steps, device)
    return Files(folder / "train", judges_of(folder, config.enc_type, config.enc_weights, config.vae, device))


def judges_of(folder: Path, encoder: str, weights: str | None, vae: str, device: str) -> Judges:
    """Return what scores depend on, for the data in a folder."""
    images = [folder / half / "images" for half in ("held_out", "train")]
    return Judges(images[0], folder / "judge.pt", encoder, weights, vae, device, images[1])


def _make_data(folder: Path, write_half: Callable[[Path, int], None], resolution: int, vae: str) -> None:
    """Make the images of both halves, and the latents of the first, on which networks are trained."""
    for half, name in enumerate(("train", "held_out")):
        raw, images = folder / "raw" / name, folder / name / "images"
        if not (images / "dataset.json").exists():
            write_half(raw, half)
            size = ["--resolution", str(resolution)]
            run(["preprocessing/convert.py", "--source", str(raw), "--dest", str(images), *size])
    images, latents = folder / "train" / "images", folder / "train" / "vae-sd"
    if not (latents / "dataset.json").exists():
        run(["preprocessing/encode.py", "--source", str(images), "--dest", str(latents), "--vae", vae])


def _make_tokens(folder: Path, name: str, encoder: str, weights: str | None) -> None:
    """Make the encoder's tokens of the images that networks are trained on."""
    images, tokens = folder / "train" / "images", folder / "train" / name
    if not (tokens / "dataset.json").exists():
        flags = ["--source", str(images), "--dest", str(tokens), "--enc-type", encoder]
        run(["preprocessing/encode_tokens.py", *flags, *(["--enc-weights", weights] if weights else [])])


def _extract_half(
    source: Path, groups_of: Callable[[FileSource], Groups], dest: Path, half: int, limit: int | None
) -> None:
    """Write every second group of each class, starting at `half` and at most `limit` pictures per class."""
    files = FileSource(source)
    for label, groups in groups_of(files).items():
        for name in [name for group in groups[half::2] for name in group][:limit]:
            if not (path := dest / label / Path(name).name).exists():
                with atomic_write(path) as file:
                    file.write(files.read(name))


def _make_judge(folder: Path, size: int, widths: list[int], steps: int, device: str = "cpu") -> None:
    if not (folder / "judge.pt").exists():
        train_judge(folder / "judge.pt", *load_images(folder / "held_out" / "images"), size, widths, steps, device)


def run(command: list[str], folder: Path | None = None, threads: int | None = None) -> None:
    """Run a program of this repository. Raises InputError if it fails.

    folder: of the program's results; its output is appended to a file next to it instead of being shown.
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    program = [sys.executable, str(ROOT / command[0]), *command[1:]]
    log = folder and folder.with_name(f"{folder.name}.log")
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") if log else contextlib.nullcontext() as output:
        done = subprocess.run(program, env=environment, stdout=output, stderr=output)
    if done.returncode:
        raise InputError(f"{' '.join(command)} failed with status {done.returncode}" + (f"; see {log}" if log else ""))
