"""The tracker of a run, wandb or tensorboard, which gets what metrics.jsonl gets. Its failure never ends a run."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL.Image import Image

from common.errors import first_line
from common.io import real_path
from training.config import RunFacts, TrainConfig
from training.messages import logger
from training.record import saved_args

# What the messages of trackers contain, and what it means.
CAUSES = {
    "api key|api_key|login|logged in|permission|unauthorized": "not logged in: `wandb login`, or WANDB_MODE=offline",
    "timed out|timeout|connection|network|resolve|unreachable|deadline": "no connection; WANDB_MODE=offline needs none",
}


def installed_tracker(config: TrainConfig) -> str | None:
    """Return the name of the tracker that --report-to asks for; None if it is none, or, with a warning, not there."""
    name = config.report_to
    if name == "none" or config.dry_run:
        return None
    if importlib.util.find_spec(name) is None:
        warn(name, f"the package is not installed (pip install {name})")
        return None
    return name


def start_tracker(config: TrainConfig, facts: RunFacts, accelerator: Accelerator) -> None:
    """Start the tracker of the accelerator, if it has one; a resumed run continues the same wandb run."""
    if not accelerator.log_with:
        return
    settings = {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for name, value in saved_args(config, facts).items()
    }
    name = re.sub(r"[^\w.-]", "-", config.exp_name)  # wandb allows no slash in an id
    run_id = f"{name}-{hashlib.sha256(str(real_path(config.folder)).encode()).hexdigest()[:8]}"
    wandb = {"name": config.exp_name, "id": run_id, "resume": "allow", "dir": str(config.folder)}
    try:
        (config.folder / config.logging_dir).mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers("REG", config=settings, init_kwargs={"wandb": wandb})
    except Exception as error:  # a tracker may raise anything
        accelerator.trackers = []
        if accelerator.is_main_process:
            warn(config.report_to, cause_of(error))
    accelerator.trackers = [SafeTracker(tracker) for tracker in accelerator.trackers]


class SafeTracker:
    """A tracker of accelerate that ends with a warning at its first failure."""

    def __init__(self, tracker: GeneralTracker):
        self.tracker = tracker
        self.name = tracker.name
        self.failed = False

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """Pass the numbers of a step."""
        self._try(lambda: self.tracker.log(values, step=step))

    def show(self, picture: Image, step: int) -> None:
        """Pass a picture of samples."""
        images, layout = {"samples": np.asarray(picture)[None]}, {}
        if self.name == "tensorboard":
            layout = {"dataformats": "NHWC"}
        self._try(lambda: self.tracker.log_images(images, step=step, **layout))

    def finish(self) -> None:
        """Close the tracker."""
        self._try(self.tracker.finish)

    def _try(self, action: Callable[[], object]) -> None:
        if self.failed:
            return
        try:
            action()
        except Exception as error:  # a tracker may raise anything
            self.failed = True
            warn(self.name, cause_of(error))


def cause_of(error: Exception) -> str:
    """Return why a tracker failed, in words that say what to do where the cause is known."""
    text = first_line(error)
    known = (meaning for pattern, meaning in CAUSES.items() if re.search(pattern, text, re.IGNORECASE))
    return next(known, text)


def warn(name: str, cause: str) -> None:
    """Say that a tracker gets no more numbers."""
    logger.warning("--report-to %s: %s. The run continues; metrics.jsonl has everything", name, cause)
