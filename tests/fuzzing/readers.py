"""Every reader of bytes from outside: a valid file, how it is read, and the changes that fit its format.

To add a reader, add a line to `READERS`. tests/test_fuzz.py checks that each module that reads files is named there.
"""

from __future__ import annotations

import hashlib
import json
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import packed
from common.cli import parse
from common.images import decode_rgb, open_image
from common.io import read_json, read_metrics
from common.sources import FileSource
from dataset import LatentDataset, decode_moments
from evaluations.batches import open_images
from evaluations.comparison import load_reference
from evaluations.evaluator import read_sampling
from evaluations.features import Extraction
from evaluations.inception.graphdef import Graph
from evaluations.inception.weights import _read_port
from evaluations.metrics import FeatureSums
from evaluations.plot import read_evaluations
from generation.config import GenerateConfig
from generation.sample_set import SampleSet, _read_cls_tokens
from models.autoencoder import load_codec
from models.checkpoint import (
    build_model,
    checkpoint_classes,
    load_checkpoint,
    save_checkpoint,
    saved_settings,
    steps_done,
)
from models.encoders import load_encoder
from preprocessing.destination import Destination
from preprocessing.listing import list_converted, list_images
from preprocessing.verify import compare_checksums
from tests.conftest import ENCODER, ENCODER_OPTIONS, RESOLUTION, write_data
from tests.fuzzing import bases, checkpoints
from tests.fuzzing.mutations import (
    Change,
    Mutated,
    bomb,
    json_line,
    json_value,
    mutate,
    npy_header,
    png_chunk,
    safetensors_header,
    safetensors_values,
    zip_field,
    zip_members,
)
from training.checkpoint_writer import CheckpointWriter
from training.config import TrainConfig, parse_args
from training.curves import loss_curves
from training.state import load_resumable, restore_optimizer, restore_weights

PICTURE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")


@dataclass(frozen=True)
class Reader:
    """A reader of foreign bytes.

    Attributes:
        make: writes valid files of a seed into a folder.
        read: reads them there and returns what was read.
        files: the files to damage; each input damages one of them.
        odd: structured changes after which another result is possible.
        invalid: structured changes that must be refused, or make no difference.
        checked: whether the format has checksums, so that random damage must not give another result.
        share: of the number of inputs, for slow readers.
    """

    make: Callable[[Path, int], Any]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    odd: tuple[Change, ...] = ()
    invalid: tuple[Change, ...] = ()
    checked: bool = False
    share: float = 1

    def input(self, rng: random.Random, valid: dict[str, tuple[bytes, bytes]]) -> tuple[str, Mutated]:
        """Return the name of a file and its damaged content. `valid` holds two valid contents of each file."""
        name = rng.choice(self.files)
        return name, mutate(rng, *valid[name], self.odd, self.invalid)

    def must_be_refused(self, change: Mutated) -> bool:
        """Return whether a result that differs from that of the valid file is wrong."""
        return change.origin == "invalid" or (change.origin == "random" and self.checked)


def digest(value: Any) -> str:
    """Return a text that is equal for equal results: the SHA-256 of nested values, arrays and networks."""
    found = hashlib.sha256()
    _update(found, value)
    return found.hexdigest()


def _update(found: Any, value: Any) -> None:
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, Tensor):
        value = value.detach().contiguous().view(torch.uint8 if value.ndim else value.dtype).numpy()
    if isinstance(value, np.ndarray):
        found.update(f"{value.dtype}{value.shape}".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        _update(found, {item.name: getattr(value, item.name) for item in fields(value)})
    elif isinstance(value, dict):
        for key in value:
            _update(found, key)
            _update(found, value[key])
    elif isinstance(value, list | tuple):
        found.update(f"{type(value).__name__}{len(value)}".encode())
        for one in value:
            _update(found, one)
    else:
        found.update(f"{type(value).__name__}:{value!r};".encode("utf-8", "backslashreplace"))


def _file(name: str, content: Callable[[int], bytes]) -> Callable[[Path, int], Any]:
    """Return a function that writes one file."""
    return lambda folder, seed: (folder / name).write_bytes(content(seed))


def _json(name: str, content: Callable[[int], Any]) -> Callable[[Path, int], Any]:
    return _file(name, lambda seed: json.dumps(content(seed)).encode())


def _pixels(folder: Path) -> Any:
    image = open_image((folder / "image").read_bytes())
    return image.mode, image.size, image.tobytes()


def _source(path: Path) -> Any:
    source = FileSource(path)
    return [(name, source.size(name), source.read(name), source.head(name)) for name in source.names]


def _data(folder: Path) -> Any:
    data = LatentDataset(folder)
    data.check()
    items = [[part.numpy() for part in data[i]] for i in range(len(data))]
    return items, data.classes, data.latent_format


def _listing(read: Callable[[FileSource], Any], folder: Path) -> Any:
    found = read(FileSource(folder / "images"))
    return found.names, found.labels, found.classes


def _images(folder: Path) -> Any:
    images = open_images(folder / "a.npz")
    found = images.read(0, images.count)
    images.digest()  # compares the checksums of what was read in parts
    return found


def _reference(folder: Path) -> Any:
    found = load_reference(folder / "a.npz")
    return found.pool, found.spatial, found.inception, found.encoder_cls, found.encoder


def _cache(folder: Path) -> Any:
    extraction = Extraction({"cls": FeatureSums(6)})
    return extraction.load(folder / "features.npz", 5, "key"), extraction.parts


def _write_cache(folder: Path, seed: int) -> None:
    extraction = Extraction({"cls": FeatureSums(6)})
    extraction.parts["cls"].update(torch.from_numpy(np.random.default_rng(seed).normal(size=(5, 6))).float())
    extraction.save(folder / "features.npz", "key")


def _model(name: str, folder: Path) -> Any:
    content = load_checkpoint(folder / name)
    model = build_model(content, source=name)
    saved, steps = saved_settings(content, name), steps_done(content, name)
    return model, checkpoint_classes(content, model.num_classes, name), steps, saved.get("path_type")


def _resume(folder: Path) -> Any:
    content = load_resumable(folder / "0000001.pt")
    model, average = bases.network(5), bases.network(6)
    restore_weights(content, model, average, "0000001.pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=TrainConfig.learning_rate)
    restore_optimizer(content, optimizer, model)
    state = [optimizer.state.get(parameter) for parameter in model.parameters()]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return model, average, state, groups, content["steps"]


def _encoder(name: str, folder: Path) -> Any:
    return load_encoder(ENCODER, RESOLUTION, folder / name)


def _write_encoder(name: str, folder: Path, seed: int) -> None:
    bases.write_encoder(folder / name, seed, ENCODER_OPTIONS, RESOLUTION)


def _codec(folder: Path) -> Any:
    codec = load_codec(str(folder))
    return codec, codec.format.scale, codec.format.shift, codec.format.channels, codec.format.factor


def _graph(folder: Path) -> Any:
    graph = Graph(folder / "graph.pb")
    constants = [graph.constant(name, shape) for name, shape in bases.GRAPH_SHAPES.items()]
    return constants, graph.switch("conv/batchnorm", "scale_after_normalization")


def _sample_set(folder: Path) -> Any:
    samples = SampleSet(folder, 5, RESOLUTION)
    samples._check_settings({"digest": "x", **_settings(0)})
    return SampleSet.started_with(folder)


def _settings(seed: int) -> dict[str, Any]:
    from generation.sample_set import DIGEST

    return {DIGEST: "ab" * 32, "num_fid_samples": 5, "cfg_scale": 1.0, "global_seed": seed}


def _classes(_: int) -> dict[str, Any]:
    labels = [[f"00000/img{i:08d}.png", i % 3] for i in range(4)]
    return {"labels": labels, "classes": ["a", "b", "c"]}


def _small_data(folder: Path, seed: int) -> None:
    write_data(folder, num=4, resolution=8)
    (folder / "images" / "dataset.json").write_text(json.dumps(_classes(seed)))


def _config(config: Callable[[list[str]], Any], folder: Path) -> Any:
    return config(["--config", str(folder / "a.json")])


def _run_settings(seed: int) -> dict[str, Any]:
    return {"exp_name": "a", "seed": seed, "learning_rate": 1e-4, "flip": False, "model": "SiT-B/2"}


def _sums(folder: Path) -> Any:
    return compare_checksums(folder / "checksums.sha256", {f"file{i}": f"{i:064x}" for i in range(4)})


def _sums_file(seed: int) -> bytes:
    return "".join(f"{i + seed:064x}  file{i}\n" for i in range(4)).encode()


def _tar(folder: Path) -> Any:
    return packed.explain_packed(folder / "a.tar"), packed.explain_packed(folder, ["a.tar"])


def _curves(folder: Path) -> Any:
    rows = read_metrics(folder / "metrics.jsonl")
    loss_curves(folder / "metrics.jsonl", folder / "loss.png")
    return rows, read_evaluations(folder / "metrics.jsonl", "fid")


def _destination_zip(folder: Path, seed: int) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(".convert.json"), json.dumps({"resolution": 8, "seed": seed}))


_ARCHIVE = {"odd": (zip_members,), "invalid": (zip_field,), "checked": True}
_WEIGHTS = {"odd": (checkpoints.entry,), "invalid": (checkpoints.code, checkpoints.tensor)}
_DATA_FILES = ("images/dataset.json", "vae-sd/dataset.json")

READERS: dict[str, Reader] = {
    kind.lower(): Reader(
        _file("image", partial(bases.encoded, kind)),
        _pixels,
        ("image",),
        odd=(png_chunk,) if kind == "PNG" else (),
        checked=kind == "PNG",
    )
    for kind in PICTURE_FORMATS
}
READERS |= {
    "rgb": Reader(
        _file("image", partial(bases.encoded, "PNG")), lambda f: decode_rgb((f / "image").read_bytes()), ("image",),
        odd=(png_chunk,), checked=True,
    ),
    "zip": Reader(lambda f, s: bases.write_zip(f / "a.zip", s), lambda f: _source(f / "a.zip"), ("a.zip",), **_ARCHIVE),
    "data": Reader(_small_data, _data, _DATA_FILES, odd=(json_value,), share=0.5),
    "data-zip": Reader(bases.write_data_zip, _data, ("images.zip",), share=0.5, **_ARCHIVE),
    "data-images": Reader(
        _small_data, _data, ("images/00000/img00000001.png",), odd=(png_chunk,), checked=True, share=0.5
    ),
    "data-latents": Reader(
        _small_data, _data, ("vae-sd/00000/img-mean-std-00000001.npy",), odd=(npy_header,), share=0.5
    ),
    "listing": Reader(_small_data, partial(_listing, list_images), _DATA_FILES[:1], odd=(json_value,)),
    "converted": Reader(_small_data, partial(_listing, list_converted), _DATA_FILES[:1], odd=(json_value,)),
    "npy": Reader(
        _file("a.npy", bases.npy), lambda f: decode_moments((f / "a.npy").read_bytes()), ("a.npy",), odd=(npy_header,)
    ),
    "cls-tokens": Reader(
        _file("a.npy", lambda s: bases.npy(s)[:128].replace(b"(6, 4, 4)", b"(24, 4)  ") + bases.npy(s)[128:]),
        lambda f: _read_cls_tokens(f / "a.npy"), ("a.npy",), odd=(npy_header,),
    ),
    "npz": Reader(_file("a.npz", bases.npz), _images, ("a.npz",), **_ARCHIVE),
    "npz-packed": Reader(_file("a.npz", partial(bases.npz, compressed=True)), _images, ("a.npz",), **_ARCHIVE),
    "reference": Reader(_file("a.npz", bases.npz), _reference, ("a.npz",), **_ARCHIVE),
    "cache": Reader(_write_cache, _cache, ("features.npz",), **_ARCHIVE),
    "json": Reader(_json("a.json", _run_settings), lambda f: read_json(f / "a.json"), ("a.json",), odd=(json_value,)),
    "config-train": Reader(
        _json("a.json", _run_settings), partial(_config, parse_args), ("a.json",), odd=(json_value,)
    ),
    "config-generate": Reader(
        _json("a.json", lambda s: {"ckpt": "a.pt", "global_seed": s, "cfg_scale": 1.5, "classes": "0,1"}),
        partial(_config, partial(parse, GenerateConfig, "")), ("a.json",), odd=(json_value,),
    ),
    "sampling": Reader(
        _json("samples.json", _settings), lambda f: read_sampling(f / "samples.npz"), ("samples.json",),
        odd=(json_value,),
    ),
    "sample-set": Reader(_json("samples.json", _settings), _sample_set, ("samples.json",), odd=(json_value,)),
    "temporary": Reader(
        _json("temporary.json", lambda s: ["0000001.pt", f"000000{s}.pt"]), lambda f: CheckpointWriter(f)._temporary(),
        ("temporary.json",), odd=(json_value,),
    ),
    "destination": Reader(
        _destination_zip, lambda f: Destination(f / "a.zip", "convert")._settings_in_zip(), ("a.zip",),
        odd=(zip_members, zip_field), checked=True,
    ),
    "metrics": Reader(_file("metrics.jsonl", bases.metrics), _curves, ("metrics.jsonl",), odd=(json_line,), share=0.1),
    "checksums": Reader(_file("checksums.sha256", _sums_file), _sums, ("checksums.sha256",)),
    "tar": Reader(_file("a.tar", bases.tar), _tar, ("a.tar",)),
    "checkpoint": Reader(
        lambda f, s: bases.write_checkpoint(f / "a.pt", s), partial(_model, "a.pt"), ("a.pt",), checked=True, **_WEIGHTS
    ),
    "checkpoint-old": Reader(
        lambda f, s: bases.write_checkpoint(f / "a.pt", s, legacy=True), partial(_model, "a.pt"), ("a.pt",), **_WEIGHTS
    ),
    "checkpoint-sum": Reader(
        lambda f, s: save_checkpoint(f / "0000001.pt", bases.checkpoint(s)), partial(_model, "0000001.pt"),
        ("0000001.pt", "0000001.pt.sha256"), checked=True
    ),
    "resume": Reader(
        lambda f, s: bases.write_checkpoint(f / "0000001.pt", s), _resume, ("0000001.pt",), checked=True,
        odd=(checkpoints.entry,), invalid=(checkpoints.optimizer, checkpoints.tensor, checkpoints.code),
    ),
    "export": Reader(
        lambda f, s: bases.write_export(f / "a.safetensors", s), partial(_model, "a.safetensors"), ("a.safetensors",),
        odd=(safetensors_header,), invalid=(safetensors_values,), checked=True,
    ),
    "export-folder": Reader(
        lambda f, s: bases.write_export(f / "a", s), partial(_model, "a"), ("a/model.safetensors",),
        odd=(safetensors_header,), invalid=(safetensors_values,), checked=True,
    ),
    "export-config": Reader(
        lambda f, s: bases.write_export(f / "a", s), partial(_model, "a"), ("a/config.json",), odd=(json_value,)
    ),
    "encoder": Reader(
        partial(_write_encoder, "a.safetensors"), partial(_encoder, "a.safetensors"), ("a.safetensors",),
        odd=(safetensors_header,), invalid=(safetensors_values,), share=0.3,
    ),
    "encoder-pt": Reader(
        partial(_write_encoder, "a.pt"), partial(_encoder, "a.pt"), ("a.pt",), checked=True, share=0.3,
        invalid=(checkpoints.code, checkpoints.tensor),
    ),
    "codec": Reader(
        bases.write_codec, _codec, ("diffusion_pytorch_model.safetensors",), odd=(safetensors_header,),
        invalid=(safetensors_values,), share=0.3,
    ),
    "codec-config": Reader(bases.write_codec, _codec, ("config.json",), odd=(json_value,), share=0.3),
    "graph": Reader(_file("graph.pb", bases.graph), _graph, ("graph.pb",)),
    "port": Reader(
        _file("a.pth", bases.port), lambda f: _read_port(f / "a.pth")[1], ("a.pth",), checked=True,
        invalid=(checkpoints.code,),
    ),
}  # fmt: skip


def prepare(reader: Reader, folder: Path) -> tuple[Path, dict[str, tuple[bytes, bytes]]]:
    """Write two valid sets of files of a reader; return the folder of the first, and both contents of `files`."""
    if {png_chunk, zip_members} & set(reader.odd):
        bomb()  # made once, before processes are forked
    places = folder / "first", folder / "second"
    for seed, place in enumerate(places):
        place.mkdir(parents=True)
        reader.make(place, seed)
    first, second = places
    return first, {name: ((first / name).read_bytes(), (second / name).read_bytes()) for name in reader.files}
