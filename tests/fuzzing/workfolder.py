"""The folder in which the changed command lines run: photographs, data, a run, samples, exports, hostile files."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.conftest import NUM_CLASSES, ROOT, write_data, write_encoder
from tests.fuzzing import bases
from tests.fuzzing.checkpoints import Code
from tests.fuzzing.command_lines import FIRST_RUN, FIRST_SAMPLES

EXPORT = "--ckpt exps/old --dest export.safetensors"
# Ghostscript would run this; Pillow starts it for a file of this format, whatever its name is.
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(executed) (w) file closefile\nshowpage\n"


def write_work_folder(folder: Path) -> None:
    """Write all files. It takes a few seconds, because it trains a network and generates images."""
    folder.mkdir(parents=True)
    write_data(folder / "data", num=8)
    for name in ("a", "b"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(2):
            (folder / "photos" / name / f"{i}.png").write_bytes(bases.encoded("PNG", i))
    (folder / "photos" / "b" / "2.jpg").write_bytes(bases.encoded("JPEG"))
    (folder / "images.zip").write_bytes(bases.zip_file())
    write_encoder(folder / "encoder.safetensors")
    rng = np.random.default_rng(0)
    for name in ("set.npz", "ref.npz"):
        np.savez(folder / name, arr_0=rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    torch.save({"model": Code(), "ema": {"x": Code()}}, folder / "evil.pt")
    (folder / "eps" / "a").mkdir(parents=True)
    (folder / "eps" / "evil.png").write_bytes(POSTSCRIPT)
    (folder / "eps" / "a" / "evil.jpg").write_bytes(POSTSCRIPT)
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("text\n")
    for program, line in (("train.py", FIRST_RUN), ("generate.py", FIRST_SAMPLES), ("export.py", EXPORT)):
        run_valid(program, line.split(), folder)
    write_comparison(folder)
    rows = [{"step": step, "fid": 300 / step} for step in (1, 2)]
    (folder / "exps" / "old" / "fid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_comparison(folder: Path) -> None:
    """Write the parts of a comparison of convergence.py that decided.py reads; the judge is not trained."""
    from experiments.judge import Judge

    study, judge = folder / "study", Judge(16, [4, 4], NUM_CLASSES)
    shutil.copytree(folder / "exps" / "old", study / "runs" / "reg-seed0")
    shutil.copytree(folder / "data", study / "data" / "train")
    shutil.copytree(folder / "data" / "images", study / "data" / "held_out" / "images")
    torch.save({"config": judge.config, "weights": judge.state_dict()}, study / "data" / "judge.pt")
    (study / "settings.json").write_text('{"sampling": {"labelled": true}}')


def new_copy(base: Path, folder: Path) -> None:
    """Replace `folder` by a copy of the work folder `base`, with a pipe, devices, and links that lead nowhere."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder, symlinks=True)
    os.mkfifo(folder / "pipe")
    for name, minor in (("null", 3), ("zero", 5)):
        try:  # root must not be given the devices of the system, which a program could replace
            os.mknod(folder / name, 0o666 | 0o020000, os.makedev(1, minor))
        except PermissionError:
            (folder / name).symlink_to(f"/dev/{name}")
    (folder / "dead").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")


def load_programs() -> None:
    """Import what the programs import late, so that the processes forked afterwards start in milliseconds."""
    import diffusers
    import matplotlib.backends.backend_agg
    import matplotlib.figure
    import safetensors.torch
    import timm
    import torchvision.utils

    from evaluations import features

    assert all((diffusers, matplotlib, safetensors, timm, torchvision, features))
    torch.set_num_threads(1)


def replace_slow_parts() -> None:
    """Replace Inception in this process by a network that takes no time; all command lines use it."""
    from evaluations import features, metrics

    def load(path: str | None = None, device: Any = "cpu") -> nn.Module:
        return SmallInception() if path is None else real(path, device)

    real, features.load_inception = features.load_inception, load
    metrics._factor = lambda covariance: covariance[:, :1]  # the true one takes seconds


class SmallInception(nn.Module):
    """In place of Inception: features of the right sizes, from the mean colours."""

    name, path, sha256, published = "small", "small", "0" * 64, False

    def forward(self, images: torch.Tensor) -> Any:
        from evaluations.inception.layers import NUM_CLASSES, NUM_FEATURES
        from evaluations.inception.network import SPATIAL_FEATURES, InceptionOutput

        colour = images.float().mean((1, 2, 3))[:, None] / 255
        sizes = (NUM_FEATURES, SPATIAL_FEATURES, NUM_CLASSES)
        return InceptionOutput(*(colour * torch.linspace(-1, 1, size) for size in sizes))


def run_valid(program: str, argv: list[str], folder: Path) -> None:
    """Run a program in a forked process, so that this one keeps no state of it. Raises RuntimeError if it fails."""
    process = os.fork()
    if not process:
        try:
            os.chdir(folder)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.argv = [str(ROOT / program), *argv]
            runpy.run_path(sys.argv[0], run_name="__main__")
            os._exit(0)
        except SystemExit as error:
            os._exit(bool(error.code))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    if os.waitpid(process, 0)[1]:
        raise RuntimeError(f"the valid command failed: {program} {' '.join(argv)}")
