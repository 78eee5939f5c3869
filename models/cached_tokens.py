"""Tokens of a frozen encoder that were written once for each image; training reads them instead of running the encoder.

    DATA/tokens-dinov2-vit-b/   00000/img-tokens-00000000.npy   (1 + T, D) float16, the class token first

is a folder or a zip with a dataset.json that describes the encoder. preprocessing/encode_tokens.py writes it. It may
also contain the tokens of the mirrored images, 00000/img-tokens-flip-00000000.npy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.data_folder import places_of
from common.errors import InputError, shown
from common.npy import decode_npy
from common.pairing import files_by_index
from common.sources import (
    TOKENS_NAME,
    FileSource,
    decode_name,
    encode_names,
    mirrored_name,
    read_dataset_json,
    tokens_name,
)
from models.encoders import EncoderOutput
from models.tensor_checks import LONGEST_NAME

DTYPE = "float16"
IMAGE_SAMPLE = 64  # images whose bytes are compared with those of which the tokens were made
LARGEST = 2**20  # of each number in the description
EXPONENT = np.uint16(0x7C00)  # bits of float16 that are all set in infinity and NaN


@dataclass(frozen=True)
class TokenFormat:
    """The encoder of cached tokens and their shape, the entry "encoder" of dataset.json.

    Attributes:
        name: of the encoder with its options, see `models.encoders.name_with_tokens`.
        weights: SHA-256 of its weights, see `models.encoders.encoders_digest`.
        images: digest of the images, see `images_digest`.
        resolution: of the images in px.
        input_size: of the encoder in px.
        tokens: number of patch tokens T.
        width: D.
    """

    name: str
    weights: str
    images: str
    resolution: int
    input_size: int
    tokens: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of a file's array: the class token, then the patch tokens."""
        return 1 + self.tokens, self.width

    def to_json(self) -> dict[str, Any]:
        """Return the fields as dataset.json has them."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> TokenFormat:
        """Return the format that `to_json` wrote. Raises InputError, naming the field, for anything else."""
        kinds = {item.name: item.type for item in fields(cls)}
        if not isinstance(content, dict) or content.keys() != kinds.keys():
            allowed = f"an object with the fields {', '.join(kinds)}, which preprocessing/encode_tokens.py writes"
            raise InputError(f"encoder is {shown(content)}; allowed: {allowed}")
        for name, value in content.items():
            if kinds[name] == "str" and not (isinstance(value, str) and 0 < len(value) <= LONGEST_NAME):
                raise InputError(f"{name} of the encoder is {shown(value)}; allowed: text")
            if kinds[name] == "int" and not (type(value) is int and 0 < value <= LARGEST):
                raise InputError(f"{name} of the encoder is {shown(value)}; allowed: whole numbers from 1 to {LARGEST}")
        return cls(**content)


@dataclass(frozen=True)
class CachedTokens:
    """The token files of one encoder.

    Attributes:
        source: the folder or zip.
        format: encoder and shape.
        has_mirrored: whether the tokens of the mirrored images exist.
        files: names of the files, one for each image of the data, in its order; empty before `of_images`.
    """

    source: FileSource
    format: TokenFormat
    has_mirrored: bool
    files: np.ndarray = field(default_factory=lambda: encode_names([]))

    @classmethod
    def open(cls, data_dir: str | Path, name: str) -> CachedTokens:
        """Return the tokens in the folder or zip `name` of the data.

        Raises InputError if there is none, or if its dataset.json does not describe an encoder.
        """
        found = places_of(data_dir, [name])
        if len(found) != 1:
            state = " and ".join(path.name for path in found) or "none; preprocessing/encode_tokens.py writes it"
            raise InputError(f"--cached-tokens {name}: expected a folder or a .zip in {data_dir}; found {state}")
        source = FileSource(found[0])
        content = read_dataset_json(source)
        try:
            form = TokenFormat.from_json(content.get("encoder"))
        except InputError as error:
            raise InputError(f"--cached-tokens {name}: {source.describe('dataset.json')}: {error}") from error
        return cls(source, form, bool(content.get("flip")))

    def of_images(self, indices: Sequence[int], flip: bool) -> CachedTokens:
        """Return the tokens of the images with these indices, in their order.

        Raises InputError, naming the file, if one is missing, or if the first one has another shape than dataset.json
        says; with `flip`, also if there are none of the mirrored images.
        """
        names = files_by_index(self.source, TOKENS_NAME, tokens_name(0))
        if missing := [index for index in indices if index not in names]:
            first = self.source.describe(tokens_name(missing[0]))
            raise InputError(
                f"{self.source.path}: {len(missing)} of {len(indices)} images have no tokens; first {first}"
            )
        if flip and not self.has_mirrored:
            advice = "preprocessing/encode_tokens.py --flip writes them"
            raise InputError(f"--flip: {self.source.path} has no tokens of the mirrored images; {advice}")
        found = replace(self, files=encode_names([names[index] for index in indices]))
        found.read(0)
        return found

    def check_images(self, images: FileSource, names: Sequence[str]) -> None:
        """Raise InputError if the tokens were made of other images than those in `images`."""
        if images_digest(images, names) != self.format.images:
            problem = "these tokens were made of other images; allowed: those that preprocessing/encode_tokens.py wrote"
            raise InputError(f"{self.source.path}: {problem} for {images.path}")

    @property
    def item_bytes(self) -> int:
        """Bytes of the tokens of one image in memory."""
        return 2 * self.format.shape[0] * self.format.shape[1]

    def keep(self, positions: np.ndarray) -> CachedTokens:
        """Return the tokens of the images at these positions."""
        return replace(self, files=self.files[positions])

    def file(self, i: int, mirrored: bool = False) -> str:
        """Return the name of the file of image i."""
        name = decode_name(self.files[i])
        return mirrored_name(name) if mirrored else name

    def read(self, i: int, mirrored: bool = False) -> Tensor:
        """Return class token and patch tokens of image i, (1 + T, D) float16.

        Raises InputError, naming the file, if it has another shape or dtype, or if a value is not finite.
        """
        return torch.from_numpy(self.source.load(self.file(i, mirrored), self.decode))

    def decode(self, data: bytes) -> np.ndarray:
        """Return the tokens in the bytes of an .npy file, (1 + T, D) float16. Raises InputError as `read` does."""
        tokens = decode_npy(data, (DTYPE,), "tokens")
        if tokens.shape != self.format.shape:
            raise InputError(f"shape {tokens.shape}; dataset.json says {self.format.shape}")
        if ((tokens.view(np.uint16) & EXPONENT) == EXPONENT).any():  # faster than np.isfinite
            raise InputError("has values that are not finite")
        return tokens


def open_tokens(data_dir: str | Path, names: str | None) -> list[CachedTokens]:
    """Return the tokens of the encoders in a comma-separated list of folders or zips; None: an empty list."""
    return [CachedTokens.open(data_dir, name.strip()) for name in names.split(",")] if names else []


def as_output(tokens: Tensor) -> EncoderOutput:
    """Return cached tokens (N, 1 + T, D) float16 as the encoder's output, float32."""
    tokens = tokens.float()
    return EncoderOutput(tokens[:, 0], tokens[:, 1:])


def images_digest(source: FileSource, names: Sequence[str]) -> str:
    """Return the SHA-256 of the bytes of up to `IMAGE_SAMPLE` images at equal distances in the list `names`."""
    digest = hashlib.sha256(str(len(names)).encode())
    for i in sorted(set(np.linspace(0, len(names) - 1, IMAGE_SAMPLE).astype(int).tolist())):
        digest.update(hashlib.sha256(source.read(names[i])).digest())
    return digest.hexdigest()
