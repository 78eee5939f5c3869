"""Every reader of bytes from outside: a valid file, how it is read, and the changes that fit its format.

To add a reader, add a line to `READERS`. tests/test_fuzz.py checks that each module that reads files is named there.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.cli import parse
from common.errors import InputError
from common.images import decode_rgb, open_image
from common.io import read_json, read_metrics
from common.packed import explain_packed
from common.sources import FileSource, tokens_name
from dataset import LatentDataset, decode_latents
from evaluations.batches import open_images
from evaluations.comparison import load_reference
from evaluations.evaluator import read_sampling
from evaluations.features import Extraction
from evaluations.inception.graphdef import Graph
from evaluations.inception.weights import _read_port
from evaluations.metrics import FeatureSums
from evaluations.plot import read_evaluations
from experiments.preparation import emoji_groups
from generation.config import GenerateConfig
from generation.sample_set import DIGEST, SampleSet, _read_cls_tokens
from models.autoencoder import load_codec
from models.cached_tokens import DTYPE, CachedTokens, TokenFormat, images_digest
from models.checkpoint import (
    build_model,
    checkpoint_classes,
    load_checkpoint,
    save_checkpoint,
    saved_settings,
    steps_done,
)
from models.encoders import load_encoder
from models.tensor_checks import check_finite
from preprocessing.destination import Destination
from preprocessing.listing import list_converted, list_images
from preprocessing.verify import read_checksums
from tests.conftest import ENCODER, RESOLUTION, write_data
from tests.fuzzing import bases, checkpoints
from tests.fuzzing.mutations import (
    Change,
    Mutated,
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
from training.class_statistics import read_class_statistics
from training.config import TrainConfig, parse_args
from training.curves import loss_curves
from training.rewind import go_back, last_row
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
        _update(found, list(value.items()))
    elif isinstance(value, list | tuple):
        found.update(f"{type(value).__name__}{len(value)}".encode())
        for one in value:
            _update(found, one)
    else:
        found.update(f"{type(value).__name__}:{value!r};".encode("utf-8", "backslashreplace"))


def _file(name: str, content: Callable[[int], bytes], read: Callable[[Path], Any], **changes: Any) -> Reader:
    """Return a reader of one file: `content` returns its bytes by seed, `read` gets its path."""

    def make(folder: Path, seed: int) -> None:
        (folder / name).write_bytes(content(seed))

    return Reader(make, lambda folder: read(folder / name), (name,), **changes)


def _image(kind: str, read: Callable[[bytes], Any]) -> Reader:
    is_png = kind == "PNG"
    content, odd = partial(bases.encoded, kind), (png_chunk,) if is_png else ()
    return _file("image", content, lambda path: read(path.read_bytes()), odd=odd, checked=is_png)


def _pixels(data: bytes) -> Any:
    image = open_image(data)
    return image.mode, image.size, image.tobytes()


def _json(name: str, content: Callable[[int], Any], read: Callable[[Path], Any]) -> Reader:
    return _file(name, lambda seed: json.dumps(content(seed)).encode(), read, odd=(json_value,))


def _temporary(path: Path) -> Any:
    (path.parent / "0000001.pt").touch()
    return CheckpointWriter(path.parent)._temporary()


def _run_settings(seed: int) -> dict[str, Any]:
    return {"exp_name": "a", "seed": seed, "learning_rate": 1e-4, "flip": False, "model": "SiT-B/2"}


def _sample_settings(seed: int) -> dict[str, Any]:
    return {DIGEST: "ab" * 32, "num_fid_samples": 5, "cfg_scale": 1.0, "global_seed": seed}


def _sample_set(path: Path) -> Any:
    samples = SampleSet(path.parent, 5, RESOLUTION)
    samples._check_settings({"digest": "x", **_sample_settings(0)})
    return SampleSet.started_with(path.parent)


def _captions(path: Path) -> Any:
    (path.parent / "a.png").touch()
    return emoji_groups(FileSource(path.parent))


def _class_statistics(path: Path) -> Any:
    name, weights = bases.ENCODER_RECORD.values()
    return tuple(read_class_statistics(path.parents[1], path.parent.name, name, weights, 3))


def _source(path: Path) -> Any:
    source = FileSource(path)
    return [(name, source.size(name), source.read(name), source.head(name)) for name in source.names]


def _small_data(folder: Path, _: int) -> None:
    write_data(folder, num=4, resolution=8)
    labels = [[f"00000/img{i:08d}.png", i % 3] for i in range(4)]
    (folder / "images" / "dataset.json").write_text(json.dumps({"labels": labels, "classes": ["a", "b", "c"]}))


def _small_draws(folder: Path, _: int) -> None:
    """Write a small data set whose latents are one draw per image."""
    _small_data(folder, 0)
    path = folder / "vae-sd" / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "latents": "draw"}))
    for file in path.parent.rglob("*.npy"):
        np.save(file, np.load(file)[:3])


def _data(folder: Path) -> Any:
    data = LatentDataset(folder)
    data.check()
    items = [[part.numpy() for part in data[i]] for i in range(len(data))]
    return items, data.classes, data.latent_format


def _small_tokens(folder: Path, seed: int) -> None:
    """Write a small data set with cached tokens of an encoder."""
    _small_data(folder, 0)
    data = LatentDataset(folder)
    images = images_digest(data.images, [data.image_file(i) for i in range(len(data))])
    form = TokenFormat("dinov2-vit-b", "0" * 64, images, resolution=8, input_size=28, tokens=4, width=3)
    labels = [[tokens_name(i), i % 3] for i in range(len(data))]
    path = folder / "tokens" / "dataset.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"labels": labels, "encoder": form.to_json(), "flip": False}))
    for i in range(len(data)):
        file = path.parent / tokens_name(i)
        file.parent.mkdir(exist_ok=True)
        np.save(file, np.random.default_rng([seed, i]).normal(size=form.shape).astype(DTYPE))


def _tokens(folder: Path) -> Any:
    data = LatentDataset(folder, tokens=[CachedTokens.open(folder, "tokens")])
    data.check()
    return [[part.numpy() for part in data[i]] for i in range(len(data))], data.tokens[0].format.to_json()


def _of_data(file: str, odd: Change) -> Reader:
    return Reader(_small_data, _data, (file,), (odd,), checked=odd is png_chunk, share=0.5)


def _listing(read: Callable[[FileSource], Any]) -> Reader:
    def names(folder: Path) -> Any:
        found = read(FileSource(folder / "images"))
        return found.names, found.labels, found.classes

    return Reader(_small_data, names, ("images/dataset.json",), odd=(json_value,))


def _npz(path: Path) -> Any:
    images = open_images(path)
    found = images.read(0, images.count)
    images.digest()  # compares the checksums of what was read in parts
    return found


def _reference(path: Path) -> Any:
    found = load_reference(path)
    return found.pool, found.spatial, found.inception, found.encoder_cls, found.encoder


def _cache(folder: Path) -> Any:
    extraction = Extraction({"cls": FeatureSums(6)})
    if not extraction.load(folder / "features.npz", 5, "key"):
        raise InputError("refused; the evaluator computes the features again")
    return extraction.parts


def _write_cache(folder: Path, seed: int) -> None:
    extraction = Extraction({"cls": FeatureSums(6)})
    extraction.parts["cls"].update(torch.from_numpy(np.random.default_rng(seed).normal(size=(5, 6))).float())
    extraction.save(folder / "features.npz", "key")


def _curves(path: Path) -> Any:
    loss_curves(path, path.with_name("loss.png"))
    return read_metrics(path), read_evaluations(path, "fid")


def _go_back(folder: Path) -> Any:
    """Go back as far as the files allow it, which are different after each input."""
    shutil.rmtree(folder / "set-aside", ignore_errors=True)
    for name in ("0000001.pt", "0000003.pt"):
        (folder / "checkpoints" / name).touch()
    return go_back(folder, 2) is None, last_row(folder / "metrics.jsonl")


def _model(path: Path) -> Any:
    content = load_checkpoint(path)
    model = build_model(content, source=path)
    saved, steps = saved_settings(content, path), steps_done(content, path)
    return model, checkpoint_classes(content, model.num_classes, path), steps, saved.get("path_type")


def _resume(path: Path) -> Any:
    content = load_resumable(path)
    steps = steps_done(content)
    model, average = bases.network(5), bases.network(6)
    restore_weights(content, model, average, "0000001.pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=TrainConfig.learning_rate)
    restore_optimizer(content, optimizer, model, alignment_has_ended=False)
    for network in (model, average):  # as a run does at its start
        check_finite(network.state_dict(), path)
    state = [optimizer.state.get(parameter) for parameter in model.parameters()]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return model, average, state, groups, steps


def _export(name: str, file: str, **changes: Any) -> Reader:
    make, read = lambda folder, seed: bases.write_export(folder / name, seed), lambda folder: _model(folder / name)
    return Reader(make, read, (file,), **changes)


def _encoder(name: str, **changes: Any) -> Reader:
    make, read = lambda f, s: bases.write_encoder(f / name, s), lambda f: load_encoder(ENCODER, RESOLUTION, f / name)
    return Reader(make, read, (name,), share=0.2, **changes)


def _codec(folder: Path) -> Any:
    codec = load_codec(str(folder))
    return codec, codec.format.scale, codec.format.shift, codec.format.channels, codec.format.factor


def _graph(path: Path) -> Any:
    graph = Graph(path)
    constants = [graph.constant(name, shape) for name, shape in bases.GRAPH_SHAPES.items()]
    return constants, graph.switch("conv/batchnorm", "scale_after_normalization")


_ARCHIVE = {"odd": (zip_members,), "invalid": (zip_field,), "checked": True}
_WEIGHTS = {"odd": (checkpoints.entry,), "invalid": (checkpoints.code, checkpoints.tensor)}
_STATE = {"odd": (checkpoints.entry,), "invalid": (checkpoints.optimizer, checkpoints.tensor, checkpoints.code)}
_EXPORT = {"odd": (safetensors_header,), "invalid": (safetensors_values,)}
_GENERATE = {"ckpt": "a.pt", "global_seed": 0, "cfg_scale": 1.5, "classes": "0,1"}

READERS: dict[str, Reader] = {kind.lower(): _image(kind, _pixels) for kind in PICTURE_FORMATS} | {
    "rgb": _image("PNG", decode_rgb),
    "zip": _file("a.zip", bases.zip_file, _source, **_ARCHIVE),
    "data": _of_data("images/dataset.json", json_value),
    "data-format": _of_data("vae-sd/dataset.json", json_value),
    "data-images": _of_data("images/00000/img00000001.png", png_chunk),
    "data-latents": _of_data("vae-sd/00000/img-mean-std-00000001.npy", npy_header),
    "data-draws": Reader(_small_draws, _data, ("vae-sd/dataset.json",), (json_value,), share=0.5),
    "data-tokens": Reader(_small_tokens, _tokens, ("tokens/dataset.json",), (json_value,), share=0.5),
    "data-token-files": Reader(
        _small_tokens, _tokens, (f"tokens/{tokens_name(0)}", f"tokens/{tokens_name(1)}"), (npy_header,), share=0.5
    ),
    "data-zip": Reader(bases.write_data_zip, _data, ("images.zip",), share=0.5, **_ARCHIVE),
    "listing": _listing(list_images),
    "converted": _listing(list_converted),
    "npy": _file("a.npy", bases.npy, lambda path: decode_latents(path.read_bytes()), odd=(npy_header,)),
    "cls-tokens": _file("a.npy", partial(bases.npy, shape=(24, 4)), _read_cls_tokens, odd=(npy_header,)),
    "npz": _file("a.npz", bases.npz, _npz, **_ARCHIVE),
    "npz-packed": _file("a.npz", partial(bases.npz, compressed=True), _npz, **_ARCHIVE),
    "reference": _file("a.npz", bases.npz, _reference, **_ARCHIVE),
    "cache": Reader(_write_cache, _cache, ("features.npz",), **_ARCHIVE),
    "json": _json("a.json", _run_settings, read_json),
    "config-train": _json("a.json", _run_settings, lambda path: parse_args(["--config", str(path)])),
    "config-generate": _json(
        "a.json", lambda _: _GENERATE, lambda path: parse(GenerateConfig, "", ["--config", str(path)])
    ),
    "class-statistics": _json(
        "dataset.json",
        lambda seed: {"encoder": bases.ENCODER_RECORD, "cls_token": {"mean": [seed, 0.5, -2.0], "std": [1.0, 0.1, 2]}},
        _class_statistics,
    ),
    "captions": _json("captions.json", lambda seed: {"captions": {"a.png": f"face {seed}"}}, _captions),
    "sampling": _json("samples.json", _sample_settings, lambda path: read_sampling(path.with_suffix(".npz"))),
    "sample-set": _json("samples.json", _sample_settings, _sample_set),
    "temporary": _json("temporary.json", lambda seed: ["0000001.pt", f"000000{seed}.pt"], _temporary),
    "destination": _file(
        "a.zip", bases.destination, lambda path: Destination(path, "convert")._settings_in_zip(),
        odd=(zip_members, zip_field), checked=True,
    ),
    "metrics": _file("metrics.jsonl", bases.metrics, _curves, odd=(json_line,), share=0.1),
    "rewind": Reader(
        bases.write_rewind, _go_back, ("rewind.json", "metrics.jsonl", "checkpoints/temporary.json"), odd=(json_line,)
    ),
    "checksums": _file("a.sha256", bases.checksums, read_checksums),
    "tar": _file("a.tar", bases.tar, lambda path: (explain_packed(path), explain_packed(path.parent, [path.name]))),
    "checkpoint": _file("a.pt", bases.checkpoint_file, _model, checked=True, **_WEIGHTS),
    "checkpoint-old": _file("a.pt", partial(bases.checkpoint_file, zipped=False), _model, **_WEIGHTS),
    "checkpoint-sum": Reader(
        lambda folder, seed: save_checkpoint(folder / "0000001.pt", bases.checkpoint(seed)),
        lambda folder: _model(folder / "0000001.pt"), ("0000001.pt", "0000001.pt.sha256"), checked=True,
    ),
    "resume": _file("0000001.pt", bases.checkpoint_file, _resume, checked=True, **_STATE),
    "export": _export("a.safetensors", "a.safetensors", checked=True, **_EXPORT),
    "export-folder": _export("a", "a/model.safetensors", checked=True, **_EXPORT),
    "export-config": _export("a", "a/config.json", odd=(json_value,)),
    "encoder": _encoder("a.safetensors", **_EXPORT),
    "encoder-pt": _encoder("a.pt", checked=True, invalid=(checkpoints.code, checkpoints.tensor)),
    "codec": Reader(bases.write_codec, _codec, ("diffusion_pytorch_model.safetensors",), share=0.5, **_EXPORT),
    "codec-config": Reader(bases.write_codec, _codec, ("config.json",), odd=(json_value,), share=0.5),
    "graph": _file("graph.pb", bases.graph, _graph),
    "port": _file("a.pth", bases.port, lambda path: _read_port(path)[1], checked=True, invalid=(checkpoints.code,)),
}  # fmt: skip


def prepare(reader: Reader, folder: Path) -> tuple[Path, dict[str, tuple[bytes, bytes]]]:
    """Write two valid sets of files of a reader; return the folder of the first, and both contents of `files`."""
    places = folder / "first", folder / "second"
    for seed, place in enumerate(places):
        place.mkdir(parents=True)
        reader.make(place, seed)
    return places[0], {name: tuple((place / name).read_bytes() for place in places) for name in reader.files}
