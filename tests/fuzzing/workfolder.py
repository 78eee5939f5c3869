"""The folder in which the changed command lines run: photographs, data, a run, samples, exports, hostile files."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.conftest import ENCODER_OPTIONS, RESOLUTION, ROOT, write_data
from tests.fuzzing import bases
from tests.fuzzing.checkpoints import Code
from tests.fuzzing.command_lines import FIRST_RUN, FIRST_SAMPLES

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
    bases.write_zip(folder / "images.zip")
    bases.write_encoder(folder / "encoder.safetensors", 0, ENCODER_OPTIONS, RESOLUTION)
    rng = np.random.default_rng(0)
    for name in ("set.npz", "ref.npz"):
        np.savez(folder / name, arr_0=rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    torch.save({"model": Code(), "ema": {"x": Code()}}, folder / "evil.pt")
    (folder / "eps" / "a").mkdir(parents=True)
    (folder / "eps" / "evil.png").write_bytes(POSTSCRIPT)
    (folder / "eps" / "a" / "evil.jpg").write_bytes(POSTSCRIPT)
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("text\n")
    for line, program in ((FIRST_RUN, "train.py"), (FIRST_SAMPLES, "generate.py"), (EXPORT, "export.py")):
        if forked(_run, program, line.split(), folder) != 0:
            raise RuntimeError(f"the valid command failed: {program} {line}")
    rows = [{"step": step, "fid": 300 / step} for step in (1, 2)]
    (folder / "exps" / "old" / "fid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


EXPORT = "--ckpt exps/old --dest export.safetensors"


def _run(program: str, argv: list[str], folder: Path) -> None:
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = [str(ROOT / program), *argv]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        if error.code:
            raise


def add_special_files(folder: Path) -> None:
    """Add what `shutil.copytree` cannot copy: a pipe, devices, links that lead nowhere."""
    os.mkfifo(folder / "pipe")
    for name, minor in (("null", 3), ("zero", 5)):
        try:  # root must not be given the devices of the system, which a program could replace
            os.mknod(folder / name, 0o666 | 0o020000, os.makedev(1, minor))
        except PermissionError:
            (folder / name).symlink_to(f"/dev/{name}")
    (folder / "dead").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")


def new_copy(base: Path, folder: Path) -> None:
    """Replace `folder` by a copy of the work folder `base`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder, symlinks=True)
    add_special_files(folder)


def load_programs() -> None:
    """Import what the programs import late, and replace Inception by a network that takes no time.

    The processes that are forked afterwards start in milliseconds. All command lines use the small network.
    """
    import diffusers
    import matplotlib.backends.backend_agg
    import matplotlib.figure
    import safetensors.torch
    import timm
    import torchvision.utils

    from evaluations import features, metrics

    assert all((diffusers, matplotlib, safetensors, timm, torchvision))  # imported for the programs
    torch.set_num_threads(1)

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


def forked(function: Callable[..., None], *arguments: Any) -> int:
    """Call a function in a forked process, so that this one keeps no state of it; return the exit status."""
    process = os.fork()
    if not process:
        try:
            function(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
