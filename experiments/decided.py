"""At which time during sampling are the class token and the image decided (REG, arXiv 2507.01467)?

    python experiments/decided.py exps/convergence/runs/reg-seed* --dest exps/convergence/decided.json

For finished runs of convergence.py, the program generates images and takes the one-step estimates of clean image and
class token at each step of the sampler. A classifier that is independent of the network, the judge, reads the class of
the decoded image. The class of the token is that of the nearest class mean of the encoder's tokens. The same is done
for noised held-out images. README.md says what the results show.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checks import MAX_BATCH, Check, between
from common.cli import Config, parse, setting, uses_cuda
from common.errors import InputError, run_cli
from common.identity import own_json
from common.io import check_writable, read_json, real_path
from common.progress import progress_bar
from dataset import LatentDataset
from evaluations.coherence import class_mean_sums
from experiments import decided_report
from experiments.estimates import Estimates, Explained, nearest, of_noised_data, while_sampling
from experiments.judge import load_images, load_judge
from experiments.scoring import SAMPLING_SEED
from loss import FROM_ENCODER, entangled_token
from models.autoencoder import load_codec
from models.checkpoint import build_model, load_checkpoint, resolve_checkpoint, saved_settings
from models.conditioning import has_null_class
from models.encoders import AFTER_NORM, load_encoder, name_with_tokens
from models.interpolant import Interpolant
from models.sit import SiT
from samplers import GuidedVelocity, ImageNoise, image_seeds

RUN_NAME = re.compile(r"(.+)-seed(\d{1,18})", re.DOTALL)
NOISE_SEED = SAMPLING_SEED + 1  # of the noise that is added to held-out images
BATCH_SIZE = 64  # of real images
SHOWN_ROWS, SHOWN_IMAGES, SHOWN_TIMES = 10, 4, 9  # in the picture of estimates, at most
OWN_RESULT = own_json("a result of decided.py", "runs", "decided", "num_steps")
TWO_OR_MORE = Check("2 or greater", lambda value: value > 1)


@dataclass(frozen=True, kw_only=True)
class Decided(Config):
    """Settings of decided.py."""

    runs: tuple[Path, ...] = setting(MISSING, "folders of finished runs, OUT/runs/ROW-seedN", flag="runs")
    dest: Path = setting(MISSING, "JSON file to write; table and pictures have its name with .md, .png, -estimates.png")
    images: int = setting(500, "generated images, and held-out images at most", check=TWO_OR_MORE)
    solver: str = setting("heun", "solver of the ODE", choices=("euler", "heun"))
    num_steps: int = setting(25, "steps of the solver; estimates are taken at each", check=between(1, 1000))
    unlabelled: bool = setting(False, "sample without labels; runs trained without labels always do")
    batch_size: int = setting(100, "images of a call of the network", check=between(1, MAX_BATCH))
    device: str = setting("auto", "auto: CUDA if available", choices=("auto", "cpu", "cuda"))

    def check_combination(self) -> None:
        if self.dest.suffix != ".json":
            raise InputError(f"--dest {self.dest}: the name must end in .json")
        check_writable(self.dest, "--dest", self.runs, OWN_RESULT)
        for path in () if self.dest.exists() else decided_report.paths(self.dest):
            if path.exists():
                raise InputError(f"--dest {self.dest}: {path} exists without it; choose another name")
        uses_cuda(self.device)


class Run(NamedTuple):
    """A finished run of a comparison."""

    row: str
    seed: int
    study: Path  # folder of the comparison
    checkpoint: Path
    settings: dict[str, Any]
    labelled: bool  # whether the comparison samples with labels

    @property
    def readout_key(self) -> tuple[Any, ...]:
        """What the judge, the codec and the class means of the run depend on."""
        return self.study, *(self.settings.get(name) for name in ("enc_type", "enc_weights", "entangle"))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the runs of the command line and write the report."""
    config = parse(Decided, "Show at which time class token and image are decided.", argv)
    runs = find_runs(config.runs)
    device = torch.device("cuda" if uses_cuda(config.device) else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as in generate.py
    readout: Readout | None = None
    results, pictures = [], {}
    for run in runs:
        if readout is None or readout.key != run.readout_key:
            readout = Readout(run, device, config.images)
        measured = Measurement(run, readout, config)
        results.append(measured.result())
        if run.row not in pictures and len(pictures) < SHOWN_ROWS:
            pictures[run.row] = measured.picture()
    settings = {name: getattr(config, name) for name in ("images", "solver", "num_steps")}
    decided_report.write(config.dest, {**settings, "runs": results}, pictures)


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs in some folders: those of the first row, then those of the next one.

    Raises InputError if one is not a run of a comparison, has no class token, or occurs twice, and if the seeds of a
    row have checkpoints of different steps.
    """
    runs = [_find_run(real_path(folder)) for folder in folders]
    if len({run.study for run in runs}) > 1:
        runs = [run._replace(row=f"{run.study.name}/{run.row}") for run in runs]
    seen: dict[str, dict[int, str]] = {}  # checkpoint of each row and seed
    for run in runs:
        seeds = seen.setdefault(run.row, {})
        if run.seed in seeds:
            raise InputError(f"runs: two are {run.row}, seed {run.seed}; give each once, in folders of different names")
        seeds[run.seed] = run.checkpoint.name
        if len(set(seeds.values())) > 1:
            names = ", ".join(f"{name} of seed {seed}" for seed, name in seeds.items())
            raise InputError(f"runs: {run.row} has checkpoints of different steps, {names}; complete all runs first")
    rows = list(seen)
    return sorted(runs, key=lambda run: rows.index(run.row))


def _find_run(folder: Path) -> Run:
    name, study = RUN_NAME.fullmatch(folder.name), folder.parent.parent
    if not folder.is_dir() or not name or not (study / "settings.json").is_file():
        raise InputError(f"{folder}: not a run of convergence.py; allowed: OUT/runs/ROW-seedN of its folder OUT")
    path = resolve_checkpoint(folder)
    settings = saved_settings(load_checkpoint(path), path)
    if (kind := settings.get("entangle")) not in FROM_ENCODER or not settings.get("enc_type"):
        raise InputError(f"{folder}: its network has no class token of an encoder (--entangle {kind})")
    for needed in ("judge.pt", "train", "held_out/images"):
        if not (study / "data" / needed).exists():
            raise InputError(f"{study / 'data' / needed}: missing; convergence.py makes it")
    if not has_null_class(settings):
        problem = "trained with a label for each image (--cfg-prob 0), but held-out images are used without labels"
        raise InputError(f"{folder}: {problem}; allowed: a run with a larger --cfg-prob")
    try:
        labelled = bool(read_json(study / "settings.json")["sampling"]["labelled"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{study / 'settings.json'}: not the settings of a comparison of convergence.py") from error
    return Run(name[1], int(name[2]), study, path, settings, labelled)


class Readout:
    """What reads classes from estimates: codec, judge, class means of the encoder, and some held-out images.

    Attributes:
        held_out, labels: at most `images` held-out images (M, 3, R, R) uint8 of all classes, and their labels (M,).
        latents, tokens: their latents (M, C, h, w), and their tokens (M, D) in the encoder's units.
    """

    def __init__(self, run: Run, device: torch.device, images: int):
        data, settings = run.study / "data", run.settings
        self.key, self.device = run.readout_key, device
        self.judge = load_judge(data / "judge.pt", device)
        train = LatentDataset(data / "train")
        self.codec = load_codec(train.latent_format.codec, device)
        self.codec.format = train.latent_format  # with measured statistics
        name = name_with_tokens(settings["enc_type"].split(",")[0], AFTER_NORM)
        weights = (settings.get("enc_weights") or "").split(",")[0] or None
        encoder, kind = load_encoder(name, train.resolution, weights, device), settings["entangle"]
        self.centres = class_mean_sums(encoder, kind, train, BATCH_SIZE, device).centres()
        held_out, labels = load_images(data / "held_out" / "images")
        rows = torch.linspace(0, len(labels) - 1, min(images, len(labels))).round().long()  # labels are in order
        self.held_out, self.labels = held_out[rows], labels[rows]
        batches = [batch.to(device) for batch in self.held_out.split(BATCH_SIZE)]
        self.latents = torch.cat([self.codec.format.sample(self.codec.encode(batch), noise=None) for batch in batches])
        self.tokens = torch.cat([entangled_token(kind, encoder(batch), None) for batch in batches])

    @torch.no_grad()
    def classes(self, estimates: Estimates) -> tuple[Tensor, Tensor]:
        """Return the classes (T, N) of the decoded images, and those (T, N) of the tokens, in the encoder's units."""
        images = torch.stack([self.judge(self.codec.decode(x))[1].argmax(1) for x in estimates.x])
        return images.cpu(), nearest(estimates.cls, self.centres).cpu()


class Measurement:
    """The curves of one run, and what its picture shows."""

    def __init__(self, run: Run, readout: Readout, config: Decided):
        self.run, self.readout, self.config = run, readout, config
        checkpoint = load_checkpoint(run.checkpoint, verify=False)
        self.model: SiT = build_model(checkpoint, device=readout.device, source=run.checkpoint)
        self.path, self.cls_lead = Interpolant.of_run(run.settings), self.model.config.cls_lead
        self.labelled = run.labelled and not config.unlabelled

    def velocity(self, labels: Sequence[int]) -> GuidedVelocity:
        """Return the network's velocity for labels (N,), without guidance."""
        y = torch.tensor(labels, device=self.readout.device)
        return GuidedVelocity(self.model, y, self.model.null_class, cls_lead=self.cls_lead)

    def noise(self, seed: int, numbers: Sequence[int]) -> ImageNoise:
        """Return the noise of images, which depends on their numbers only."""
        shape = (self.model.in_channels, self.model.input_size, self.model.input_size)
        return ImageNoise(image_seeds(seed, numbers), shape, self.model.cls_token_dim, self.readout.device)

    @torch.inference_mode()
    def generated(self, numbers: Sequence[int]) -> Estimates:
        """Return the estimates while images with these numbers are generated."""
        classes = self.readout.judge.config["classes"]
        labels = [number % classes if self.labelled else self.model.null_class for number in numbers]
        velocity, noise = self.velocity(labels), self.noise(SAMPLING_SEED, numbers)
        how = self.config.solver, self.config.num_steps, self.cls_lead
        return self.in_encoder_units(while_sampling(velocity, noise, self.path, *how))

    @torch.inference_mode()
    def noised(self, numbers: Sequence[int], times: list[float]) -> Estimates:
        """Return the estimates for noised held-out images with these numbers, without their labels."""
        velocity = self.velocity([self.model.null_class] * len(numbers))
        latents, tokens, scale = self.readout.latents[numbers], self.readout.tokens[numbers], self.model.cls_scale
        data = latents, tokens if scale is None else scale.standardize(tokens)
        noise = self.noise(NOISE_SEED, numbers)()
        return self.in_encoder_units(of_noised_data(velocity, data, noise, self.path, times, self.cls_lead))

    def in_encoder_units(self, estimates: Estimates) -> Estimates:
        """Return estimates with the encoder's class tokens, also if the network denoises standardised ones."""
        scale = self.model.cls_scale
        return estimates if scale is None else estimates._replace(cls=scale.restore(estimates.cls))

    def result(self) -> dict[str, Any]:
        """Return the curves of generated and of held-out images, each a list with a number for each time."""
        generated, held_out, labels = Curves(self.readout), Curves(self.readout), self.readout.labels
        for numbers in self._batches(self.config.images, "sampling"):
            right = torch.tensor(numbers) % self.readout.judge.config["classes"] if self.labelled else None
            generated.update(self.generated(numbers), right)
        for numbers in self._batches(len(labels), "held-out images"):
            held_out.update(self.noised(numbers, generated.times), labels[numbers])
        return {
            "row": self.run.row,
            "seed": self.run.seed,
            "checkpoint": self.run.checkpoint.name,
            "labelled": self.labelled,
            "cls_lead": self.cls_lead,
            "times": generated.times,
            "generated": generated.curves(),
            "held_out": held_out.curves(),
        }

    def picture(self) -> decided_report.Shown:
        """Return what the picture shows of this run."""
        estimates = self.generated(range(SHOWN_IMAGES))
        at = sorted({round(i) for i in torch.linspace(0, len(estimates.times) - 1, SHOWN_TIMES).tolist()})
        estimates = Estimates([estimates.times[i] for i in at], estimates.x[at], estimates.cls[at])
        images = torch.stack([self.readout.codec.decode(x).cpu() for x in estimates.x])
        neighbours = self.readout.held_out[nearest(estimates.cls, self.readout.tokens).cpu()]
        return decided_report.Shown(estimates.times, images, neighbours, *self.readout.classes(estimates))

    def _batches(self, count: int, what: str) -> Iterator[range]:
        """Yield the numbers below `count` in batches."""
        size, text = self.config.batch_size, f"{self.run.row}, seed {self.run.seed}: {what}"
        for first in progress_bar(range(0, count, size), desc=text, unit="batch"):
            yield range(first, min(first + size, count))


class Curves:
    """The curves of a run, from batches of estimates."""

    def __init__(self, readout: Readout):
        self.readout, self.times = readout, []
        self.shares: dict[str, list[Tensor]] = {}  # (T, N) of each batch
        self.explained = {"image": Explained(), "token": Explained()}

    def update(self, estimates: Estimates, labels: Tensor | None) -> None:
        """Add the estimates of a batch, and the classes (N,) that are right, if they are known."""
        self.times = estimates.times
        image, token = self.readout.classes(estimates)
        shares = {"agree": image == token}
        for name, classes in (("image", image), ("token", token)):
            shares[f"{name}_decided"] = classes == classes[-1]
            if labels is not None:
                shares[f"{name}_right"] = classes == labels
        shares["token_cosine"] = F.cosine_similarity(estimates.cls, estimates.cls[-1:], dim=-1).cpu()
        for name, values in shares.items():
            self.shares.setdefault(name, []).append(values.double())
        self.explained["image"].update(estimates.x)
        self.explained["token"].update(estimates.cls)

    def curves(self) -> dict[str, list[float]]:
        """Return the curves by name, each a number for each time.

        image_decided, token_decided: share of images whose estimate has the class of the final one. image_right,
        token_right: share whose estimate has the right class, if that is known. agree: share with equal classes of
        image and token. token_cosine: mean cosine of the token's estimate with the final token. image_explained,
        token_explained: see `Explained`.
        """
        means = {name: torch.cat(parts, dim=1).mean(1).tolist() for name, parts in self.shares.items()}
        return means | {f"{name}_explained": part.curve() for name, part in self.explained.items()}


if __name__ == "__main__":
    run_cli(main)
