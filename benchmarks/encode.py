"""Measures the work before training: a codec, the preprocessing programs, and the training loader.

    python benchmarks/encode.py [--vae FOLDER] [--device cuda] [--dtype fp16] [--json encode.json]
    python benchmarks/encode.py --work programs --source imagenette.zip --vae FOLDER [--images 1000]
    python benchmarks/encode.py --work loader --data DATA [--pack]

codec: encoding and decoding in one process, plain, then with one optimization after the other. Without --vae this is
Stable Diffusion's architecture with random weights, which is as fast as with trained ones. The plain form is float32
(TF32 on a GPU), channels first, one image at a time. Utilisation compares the codec's floating-point operations per
second with those of a large matrix product on the same device in the same precision.

programs: each row is one run of preprocessing/convert.py or encode.py. The same command is run a second time, when no
work is left; the time of that run is the start-up time and is subtracted. Memory is that of the program's largest
process.

loader: images and latents per second from the layout of --data; --pack also writes them to uncompressed zips in a
temporary folder and measures those in the same run. Ratios are relative to the first number of workers.
"""

from __future__ import annotations

import copy
import itertools
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import timing
from common.checks import AUTO, BATCH_SIZE, NON_NEGATIVE, POSITIVE
from common.cli import batch_size, parse, require, setting
from common.distributed import largest_batch
from common.errors import InputError, run_cli
from common.progress import progress_bar
from common.sources import FileSource
from dataset import GlobalBatchSampler, LatentDataset
from models.autoencoder import SD_FORMAT, Codec, KLCodec, load_codec
from models.inference import NETWORK_DTYPES
from preprocessing.listing import list_images
from preprocessing.parallel import available_cores

LARGEST_BATCH = 128
LOADER_BATCH = 64  # images of a batch of the loader
COLUMNS = {
    "work": "{work}", "setting": "{setting}", "batch": "{batch}", "images/s": "{images_per_s:.2f}",
    "ratio": "{ratio:.2f}", "memory, GB": "{memory_gb:.2f}", "start-up, s": "{startup_s:.1f}",
    "utilisation": "{utilisation:.0%}", "deviation": "{max_deviation:.1e}", "rms": "{rms_deviation:.1e}",
}  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Encode(timing.Benchmark):
    """Settings of the benchmark."""

    work: tuple[str, ...] = setting(("codec",), "what to measure", choices=("codec", "programs", "loader"))
    vae: str | None = setting(None, "codec to measure; default: Stable Diffusion's architecture, random weights")
    resolution: int = setting(256, "side of the images, px", check=POSITIVE)
    batch_size: int | str = setting(32, "images at a time; auto: the most that fit", check=BATCH_SIZE, parse=batch_size)
    dtype: str = setting("float32", "half precision to measure; float32: none", choices=tuple(NETWORK_DTYPES))
    compile: bool = setting(True, "also measure the compiled codec")
    tf32: bool = setting(True, "allow TF32 on a GPU, which is also the default of preprocessing/encode.py")
    rounds: int = setting(3, "timings of each form", check=POSITIVE)
    workers: tuple[int, ...] = setting(
        (1, available_cores()),
        "processes of convert.py, threads of encode.py, processes of the loader; 0: the training process loads",
        check=NON_NEGATIVE,
    )
    source: Path | None = setting(None, "photographs for the programs, a folder or zip")
    images: int | None = setting(
        None, "use this many photographs, spread over the source; default: all", check=POSITIVE
    )
    data: Path | None = setting(None, "images and latents for the loader, a folder")
    batches: int = setting(60, f"batches of {LOADER_BATCH} images to load", check=POSITIVE)
    pack: bool = setting(False, "also write the data to zips in a temporary folder and measure them")

    def check_combination(self) -> None:
        super().check_combination()
        needed = {"programs": {"--source": self.source, "--vae": self.vae}, "loader": {"--data": self.data}}
        for work in self.work:
            for flag in (flag for flag, value in needed.get(work, {}).items() if value is None):
                raise InputError(f"--work {work}: needs {flag}")
        if "programs" in self.work and 0 in self.workers:
            raise InputError("--workers 0: must be greater than 0 with --work programs")
        if "codec" in self.work:
            if self.vae == "pixel":
                raise InputError("--vae pixel: it computes nothing that could be measured")
            require("diffusers", "measuring a codec")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    config = parse(Encode, "Measure the work before training.", argv)
    device, result, rows = config.torch_device, {"cores": available_cores()}, []
    print(f"{timing.hardware(device)}, torch {torch.__version__}, {config.resolution} px, {config.vae or 'SD-VAE'}")
    if "codec" in config.work:
        result["flops"], rows = measure_codec(config)
    if "programs" in config.work:
        rows += measure_programs(config)
    if "loader" in config.work:
        rows += measure_loader(config)
    print(f"\n{timing.markdown_table(COLUMNS, rows)}")
    timing.write_result(config.json, {**result, "rows": rows}, device)


class Form(NamedTuple):
    """One row: a codec, its batch size, and the precision of its arithmetic."""

    name: str
    codec: Codec
    batch_size: int
    dtype: str


def measure_codec(config: Encode) -> tuple[dict[str, int], list[Row]]:
    """Return the floating-point operations of one image, and the rows of encoding and decoding."""
    device, side = config.torch_device, config.resolution
    on_gpu = device.type == "cuda"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.manual_seed(0)
    codec = (load_codec(config.vae) if config.vae else sd_architecture()).to(device)
    if config.batch_size == AUTO:
        blank = torch.zeros(LARGEST_BATCH, 3, side, side, dtype=torch.uint8, device=device)
        count = largest_batch(lambda n: codec.encode(blank[:n]), LARGEST_BATCH) if on_gpu else 1
        config = replace(config, batch_size=count)
    images = torch.randint(0, 256, (config.batch_size, 3, side, side), dtype=torch.uint8)
    shape = (codec.format.channels, side // codec.format.factor, side // codec.format.factor)
    latents = torch.randn(config.batch_size, *shape, device=device)
    flops = {
        "encode": timing.count_flops(lambda: codec.encode(images[:1].to(device))),
        "decode": timing.count_flops(lambda: codec.decode(latents[:1])),
    }
    print(f"one image: encode {flops['encode'] / 1e9:.1f} GFLOP, decode {flops['decode'] / 1e9:.1f} GFLOP")
    forms = build_forms(codec, config)
    peaks = {dtype: timing.matrix_rate(device, 1, NETWORK_DTYPES[dtype]) for dtype in {form.dtype for form in forms}}
    rows = []
    for work, inputs in ((encode, images.pin_memory() if on_gpu else images), (decode, latents)):
        runs = {form.name: partial(work, form.codec, inputs, device, form.batch_size) for form in forms}
        for form, row in zip(forms, timing.compare(runs, device, config.rounds), strict=True):
            rate = config.batch_size / row["seconds"]
            utilisation = rate * flops[work.__name__] / peaks[form.dtype]
            about = {"work": work.__name__, "batch": form.batch_size, "images_per_s": rate}
            rows.append({**row, **about, "utilisation": utilisation})
    return flops, rows


def sd_architecture() -> Codec:
    """Return the codec of Stable Diffusion 1.x (83.7 M parameters) with random weights."""
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        latent_channels=4,
    )
    return KLCodec(autoencoder, SD_FORMAT)


def build_forms(plain: Codec, config: Encode) -> list[Form]:
    """Return the rows. Programs use the third on a GPU, and the first two on a CPU, where they are more accurate."""
    plain = nn.Module.to(plain, memory_format=torch.contiguous_format)  # `Codec.to` keeps the format of the programs
    forms = [
        Form("one image at a time", plain, 1, "float32"),
        Form("+ batch", plain, config.batch_size, "float32"),
    ]
    last = nn.Module.to(copy.deepcopy(plain), memory_format=torch.channels_last)
    forms.append(Form("+ channels last", last, config.batch_size, "float32"))
    if config.dtype != "float32":
        last = nn.Module.to(copy.deepcopy(last), NETWORK_DTYPES[config.dtype])
        forms.append(Form(f"+ network in {config.dtype}", last, config.batch_size, config.dtype))
    if config.compile:
        last = copy.deepcopy(last)
        for part in (last.autoencoder.encoder, last.autoencoder.decoder):
            part.compile(dynamic=False)
        forms.append(Form("+ compiled", last, config.batch_size, forms[-1].dtype))
    return forms


def encode(codec: Codec, images: Tensor, device: torch.device, count: int) -> Tensor:
    """Return moments in host memory, from uint8 images in host memory, `count` at a time."""
    return torch.cat([codec.encode(part.to(device, non_blocking=True)) for part in images.split(count)]).cpu()


def decode(codec: Codec, latents: Tensor, device: torch.device, count: int) -> Tensor:
    """Return uint8 images in host memory, from latents on the device, `count` at a time."""
    return torch.cat([codec.decode(part) for part in latents.split(count)]).cpu()


def measure_programs(config: Encode) -> list[Row]:
    """Return the rows of convert.py and encode.py on photographs."""
    source, rows = FileSource(config.source), []
    names = list_images(source).names
    names = names[:: max(1, len(names) // (config.images or len(names)))][: config.images]  # at equal distances
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        photographs = copy_files(source, names, work / "photographs.zip")
        for workers in config.workers:
            images = work / f"images{workers}"
            flags = ["--source", photographs, "--dest", images, "--resolution", config.resolution, "--labels", "none"]
            flags += ["--workers", workers]
            rows.append(measure_program("convert.py", f"{workers} workers", flags, len(names), 1))
        for threads, size in itertools.product(config.workers, dict.fromkeys((1, config.batch_size))):
            dest = work / f"latents-{threads}-{size}"
            flags = ["--source", images, "--dest", dest, "--vae", config.vae, "--batch-size", size]
            rows.append(measure_program("encode.py", f"batch {size}, {threads} threads", flags, len(names), threads))
    return rows


def copy_files(source: FileSource, names: list[str], path: Path) -> Path:
    """Write some of a source's files to an uncompressed zip and return its path."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in progress_bar(names, desc=f"writing {path.name}", unit="file"):
            archive.writestr(name, source.read(name))
    return path


def run_program(program: str, flags: list[object], threads: int) -> tuple[float, float]:
    """Return the seconds that a program takes, and the memory of its largest process in GB."""
    command = [sys.executable, ROOT / "preprocessing" / program, *flags]
    return timing.run_measured(command, {"OMP_NUM_THREADS": str(threads)})


def measure_program(program: str, label: str, flags: list[object], images: int, threads: int) -> Row:
    """Run a program twice; return its images per second without the start-up, and its memory.

    The rate is None if the program takes no longer than its start-up: there are too few images.
    """
    seconds, memory = run_program(program, flags, threads)
    startup, _ = run_program(program, flags, threads)
    rate = images / (seconds - startup) if seconds > startup else None
    about = {"work": program, "setting": label, "images": images}
    return {**about, "images_per_s": rate, "startup_s": startup, "memory_gb": memory}


def measure_loader(config: Encode) -> list[Row]:
    """Return the rows of the training loader, from --data and from zips."""
    torch.set_num_threads(1)
    datasets, rows = [LatentDataset(config.data)], []
    with tempfile.TemporaryDirectory(dir=config.data.parent) as scratch:
        if config.pack:
            for source in (datasets[0].images, datasets[0].latents):
                copy_files(source, source.names, Path(scratch) / f"{source.path.stem}.zip")
            datasets.append(LatentDataset(Path(scratch)))
        for dataset in datasets:
            for workers in config.workers:
                rate = loader_rate(dataset, workers, config.batches)
                label = f"{'zip' if dataset.images.is_zip else 'folder'}, {workers} workers"
                row = {"work": "loader", "setting": label, "batch": LOADER_BATCH, "images_per_s": rate}
                rows.append({**row, "ratio": rate / rows[0]["images_per_s"] if rows else 1.0})
    return rows


def loader_rate(dataset: LatentDataset, workers: int, batches: int) -> float:
    """Return the images per second in the shuffled order of training, after the first batch."""
    sampler = GlobalBatchSampler(len(dataset), LOADER_BATCH, seed=0, steps=range(batches + 1))
    loader = iter(DataLoader(dataset, batch_sampler=sampler, num_workers=workers))
    next(loader)
    start = time.perf_counter()
    count = sum(len(labels) for _, _, labels in loader)
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    run_cli(main)
