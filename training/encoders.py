"""The frozen encoders of a run, or the cached tokens that are read instead."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator

from common.cli import changed
from common.errors import InputError
from dataset import LatentDataset
from models.cached_tokens import CachedTokens
from models.encoders import Encoder, encoders_digest, load_encoders, name_with_tokens
from training.config import TrainConfig


def name_encoders(config: TrainConfig, tokens: Sequence[CachedTokens]) -> TrainConfig:
    """Return the settings with the encoders of cached tokens as --enc-type, if the flag is not given.

    Raises InputError, naming both, if it is given and differs.
    """
    if not tokens:
        return config
    recorded = ",".join(one.format.name for one in tokens)
    if "enc_type" in config.given and name_with_tokens(config.enc_type) != recorded:
        problem = f"were written by --enc-type {recorded}, but --enc-type is {config.enc_type}"
        raise InputError(f"--cached-tokens {config.cached_tokens}: {problem}; omit --enc-type, or give the same")
    return changed(config, enc_type=recorded)


def make_encoders(config: TrainConfig, data: LatentDataset, accelerator: Accelerator) -> list[Encoder]:
    """Return the frozen encoders, empty if neither class slot nor alignment needs one.

    With cached tokens only the first encoder is loaded, and only if the samples of an evaluation are given to it.
    Raises InputError if the latents do not divide into patches, if there are not as many patch tokens as latent tokens,
    or if the first encoder is not that of the cached tokens.
    """
    if not config.reads_encoder:
        return []
    size, patch = data.latent_size, int(config.model.rsplit("/")[1])
    if size % patch:
        raise InputError(f"--model {config.model}: latents of {size} x {size} do not divide into patches of {patch}")
    count = (size // patch) ** 2
    if not data.tokens:
        return load_encoders(config.enc_type, data.resolution, config.enc_weights, count, accelerator.device)
    for one in data.tokens:
        if one.format.tokens != count:
            rule = f"{one.format.tokens} patch tokens, but there are {count} latent tokens; the numbers must be equal"
            raise InputError(f"--cached-tokens: {one.source.path} has {rule}")
    if not config.eval_steps:
        return []
    name, weights = config.enc_type.split(",")[0], (config.enc_weights or "").split(",")[0]
    encoders = load_encoders(name, data.resolution, weights or None, count, accelerator.device)
    if encoders_digest(encoders) != data.tokens[0].format.weights:
        problem = f"is not the encoder that wrote {data.tokens[0].source.path}: its weights differ"
        raise InputError(f"--eval-steps {config.eval_steps}: {name}, {weights or 'from the hub'}, {problem}")
    return encoders


def find_digests(data: LatentDataset, encoders: Sequence[Encoder]) -> dict[str, str]:
    """Return the digests of what the run reads, by the names in `training.config.DIGESTS`.

    Of several encoders there is one digest for each, which is the same with cached tokens, and without cached tokens
    one of all together as in earlier versions.
    """
    digests = {"data_digest": data.digest()}
    each = [one.format.weights for one in data.tokens] or [encoders_digest([encoder]) for encoder in encoders]
    if len(each) == 1:
        return digests | {"encoder_digest": each[0]}
    if each:
        digests["encoder_digests"] = ",".join(each)
    return digests if data.tokens or not encoders else digests | {"encoder_digest": encoders_digest(encoders)}
