"""Training with cached tokens equals training with the encoder whose output is rounded to float16."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from common.errors import InputError
from dataset import LatentDataset
from models.cached_tokens import CachedTokens, as_output
from models.checkpoint import load_checkpoint
from models.encoders import Encoder, EncoderOutput, load_encoder
from preprocessing import encode_tokens
from preprocessing.destination import write_dataset_json
from tests.conftest import ENCODER, RESOLUTION, read_rows, reset_accelerate, run_training, write_encoder
from tests.processes import Training
from tests.test_dataset import to_zip
from tests.test_train import terms
from training import sampling

SHAPE = (17, 32)


def write_tokens(data, weights, *flags, name="tokens", encoder=ENCODER):
    arguments = ["--source", data / "images", "--dest", data / name, "--enc-type", encoder, "--enc-weights", weights]
    reset_accelerate()
    encode_tokens.main([str(argument) for argument in (*arguments, "--workers", 0, *flags)])


def write_mirrored(data):
    """Write the latents of the mirrored images, as encode.py --flip does."""
    for path in list((data / "vae-sd").rglob("*.npy")):
        np.save(path.with_name(path.name.replace("std-", "std-flip-")), np.load(path)[..., ::-1])
    change_json(data / "vae-sd", lambda content: content.update(flip=True))


def change_json(folder, change):
    content = json.loads((folder / "dataset.json").read_text())
    change(content)
    write_dataset_json(folder / "dataset.json", content)


@pytest.fixture(scope="module")
def cached(tmp_path_factory, shared_data, encoder_weights):
    """A data set with latents and tokens of the mirrored images, to be read only; "second" is of another encoder."""
    data = tmp_path_factory.mktemp("cached") / "data"
    shutil.copytree(shared_data, data)
    write_mirrored(data)
    write_tokens(data, encoder_weights, "--flip", "--batch-size", 5)
    weights = write_encoder(data.parent / "second.safetensors", embed_dim=24)
    write_tokens(data, weights, "--flip", name="second", encoder=ENCODER.replace("dim=32", "dim=24"))
    return data


@pytest.fixture
def copy(cached, tmp_path):
    """A copy of this data set to be damaged at will."""
    shutil.copytree(cached, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def flags(train_flags, cached):
    """Flags of a short run on this data set, without --enc-type and --enc-weights."""
    place = train_flags.index("--enc-type")
    kept = train_flags[:place] + train_flags[place + 4 :]
    return [*replaced(kept, "--data-dir", cached), "--max-train-steps", "4", "--exp-name", "cached"]


def replaced(flags, name, value):
    place = flags.index(name)
    return [*flags[: place + 1], str(value), *flags[place + 2 :]]


@pytest.fixture
def loaded(flags, encoder_weights):
    """The same flags with the encoder."""
    return [*replaced(flags, "--exp-name", "loaded"), "--enc-type", ENCODER, "--enc-weights", str(encoder_weights)]


@pytest.fixture
def rounded(monkeypatch):
    """Let the encoders round as the files do."""
    forward = Encoder.forward
    monkeypatch.setattr(
        Encoder, "forward", lambda self, images: EncoderOutput(*(one.half().float() for one in forward(self, images)))
    )


def test_tokens_are_the_output_of_the_encoder_in_float16(cached, encoder_weights):
    encoder = load_encoder(ENCODER, RESOLUTION, encoder_weights)
    data = LatentDataset(cached, flip=True, tokens=[CachedTokens.open(cached, "tokens")])
    plain = LatentDataset(cached, flip=True)
    for i in (0, 4, 23, 24, 47):
        tokens, latents, label = data[i]
        image, expected_latents, expected_label = plain[i]
        output = encoder(image[None])
        expected = torch.cat([output.cls_token[:, None], output.patch_tokens], dim=1)[0]
        assert tokens.dtype == torch.float16 and tokens.shape == SHAPE
        torch.testing.assert_close(tokens.float(), expected, rtol=2e-3, atol=1e-4)
        assert torch.equal(latents, expected_latents) and label == expected_label
    images = torch.stack([plain[i][0] for i in range(20, 24)])  # the last batch of 5
    output = encoder(images)
    found = as_output(torch.stack([data[i][0] for i in range(20, 24)]))
    assert all(torch.equal(a, b.half().float()) for a, b in zip(found, output, strict=True))


MODES = {
    "reg": [],
    "repa": ["--no-cls-token"],
    "patch mean": ["--entangle", "patch-mean"],
    "spatial norm": ["--spatial-norm", "0.6", "--align-stop-steps", "2"],
    "flip": ["--flip", "--max-images", "13", "--gradient-accumulation-steps", "2", "--num-workers", "1"],
}


@pytest.mark.cpu
@pytest.mark.parametrize("mode", MODES)
def test_a_run_equals_that_with_the_rounded_encoder(flags, loaded, rounded, mode):
    cached, loaded = (run_training([*one, *MODES[mode]]) for one in ([*flags, "--cached-tokens", "tokens"], loaded))
    names = sorted(set.intersection(*(set(row) for row in read_rows(loaded))) & {"loss", "proj", "cls", "grad_norm"})
    np.testing.assert_allclose(terms(cached, *names), terms(loaded, *names), rtol=1e-5, atol=1e-5)
    a, b = (load_checkpoint(run / "checkpoints" / "0000004.pt") for run in (cached, loaded))
    for key, value in a["ema"].items():
        torch.testing.assert_close(value, b["ema"][key], rtol=1e-4, atol=1e-5)
    assert a["args"].encoder_digest == b["args"].encoder_digest and a["args"].data_digest == b["args"].data_digest
    assert a["args"].enc_type == b["args"].enc_type == ENCODER


@pytest.mark.cpu
def test_a_run_equals_that_of_an_encoder_that_returns_the_cached_values(flags, loaded, cached, monkeypatch):
    """To the last bit."""
    data = LatentDataset(cached, flip=True, tokens=[CachedTokens.open(cached, "tokens")])
    images = LatentDataset(cached, flip=True)
    known = {images[i][0].numpy().tobytes(): data[i][0] for i in range(2 * len(data))}

    def forward(self, batch):
        return as_output(torch.stack([known[image.numpy().tobytes()] for image in batch.cpu()]))

    monkeypatch.setattr(Encoder, "forward", forward)
    runs = [run_training([*one, "--flip"]) for one in ([*flags, "--cached-tokens", "tokens"], loaded)]
    a, b = (load_checkpoint(run / "checkpoints" / "0000004.pt") for run in runs)
    assert terms(runs[0]) == terms(runs[1])
    assert all(torch.equal(a[part][key], b[part][key]) for part in ("model", "ema") for key in a[part])


def test_the_encoders_rounding_changes_little(flags, loaded):
    cached, loaded = run_training([*flags, "--cached-tokens", "tokens"]), run_training(loaded)
    np.testing.assert_allclose(terms(cached), terms(loaded), rtol=1e-3, atol=1e-3)


def test_no_encoder_is_loaded_and_no_image_decoded(flags, monkeypatch, said):
    monkeypatch.setattr("training.encoders.load_encoders", None)
    reset_accelerate()
    run = train.set_up(train.parse_args([*flags, "--cached-tokens", "tokens"]))
    monkeypatch.setattr(LatentDataset, "image", None)
    assert train.train(run) and run.encoders == []
    assert any(f"{ENCODER} (cached tokens in tokens)" in line for line in said)


@pytest.mark.cpu
def test_several_encoders_and_zips(flags, loaded, copy, encoder_weights, rounded):
    to_zip(copy / "second")
    both = [*replaced(flags, "--data-dir", copy), "--cached-tokens", "tokens,second"]
    cached = run_training(both)
    second = ENCODER.replace("dim=32", "dim=24")
    loaded = replaced(loaded, "--enc-type", f"{ENCODER},{second}")
    weights = write_encoder(copy / "second.safetensors", embed_dim=24)
    loaded = run_training(replaced(loaded, "--enc-weights", f"{encoder_weights},{weights}"))
    np.testing.assert_allclose(terms(cached), terms(loaded), rtol=1e-5, atol=1e-5)
    digests = [json.loads((run / "args.json").read_text()).get("encoder_digests") for run in (cached, loaded)]
    assert digests[0] == digests[1] and len(digests[0]) == 2 * 64 + 1


@pytest.mark.cpu
def test_a_run_resumes_with_and_without_cached_tokens(flags, loaded, rounded):
    whole = run_training([*flags, "--cached-tokens", "tokens", "--max-train-steps", "6"])
    loaded = replaced(loaded, "--exp-name", "mixed")
    tokens = [*replaced(flags, "--exp-name", "mixed"), "--cached-tokens", "tokens", "--resume", "latest"]
    run_training(replaced(tokens, "--max-train-steps", 2))
    run_training([*replaced(loaded, "--max-train-steps", 4), "--resume", "latest"])
    mixed = run_training(replaced(tokens, "--max-train-steps", 6))
    np.testing.assert_allclose(terms(mixed), terms(whole), rtol=1e-5, atol=1e-5)


@pytest.mark.cpu
def test_two_processes(flags, tmp_path):
    one = run_training([*flags, "--cached-tokens", "tokens", "--flip"])
    flags = [*replaced(flags, "--exp-name", "two"), "--cached-tokens", "tokens", "--flip"]
    two = Training(flags, tmp_path / "output.txt", processes=2)
    assert two.wait() == 0, two.text()
    np.testing.assert_allclose(terms(one), terms(one.parent / "two"), rtol=1e-5, atol=1e-6)


def test_the_memory_of_an_item(cached):
    data = LatentDataset(cached, tokens=[CachedTokens.open(cached, name) for name in ("tokens", "second")])
    assert data.item_bytes == sum(part.nbytes for part in data[0][:-1])
    assert LatentDataset(cached).item_bytes == sum(part.nbytes for part in LatentDataset(cached)[0][:-1])


def other_json(folder):
    shutil.copy(folder.parent / "vae-sd" / "dataset.json", folder / "dataset.json")


def file_of(folder, i=3):
    return folder / f"00000/img-tokens-{i:08d}.npy"


def save(i, array):
    return lambda folder: np.save(file_of(folder, i), array)


def not_finite(folder):
    tokens = np.load(file_of(folder))
    tokens[5, 7] = np.nan
    np.save(file_of(folder), tokens)


def encoder_field(name, value):
    return lambda folder: change_json(folder, lambda content: content["encoder"].update({name: value}))


def other_image(folder):
    shutil.copy(folder.parent / "images/00000/img00000000.png", folder.parent / "images/00000/img00000023.png")


BAD = {
    "no folder": (shutil.rmtree, [], r"--cached-tokens tokens: expected a folder or a \.zip in .*copy; found none"),
    "foreign json": (other_json, [], r"tokens/dataset\.json: encoder is None; allowed: an object with the fields name"),
    "field": (encoder_field("width", "a"), [], "width of the encoder is 'a'; allowed: whole numbers from 1 to"),
    "name": (encoder_field("name", ""), [], "name of the encoder is ''; allowed: text"),
    "width": (encoder_field("width", 31), [], r"img-tokens-00000000\.npy: shape \(17, 32\); .* says \(17, 31\)"),
    "first shape": (save(0, np.zeros((16, 32), np.float16)), [], r"shape \(16, 32\); dataset.json says \(17, 32\)"),
    "dtype": (save(0, np.zeros(SHAPE, np.float32)), [], r"img-tokens-00000000\.npy: dtype float32; allowed: float16"),
    "missing": (lambda folder: file_of(folder).unlink(), [], r"1 of 24 images have no tokens; first .*-00000003\.npy"),
    "size": (save(3, np.zeros(SHAPE, np.float32)), [], r"-00000003\.npy: 2304 bytes; the first tokens have 1216"),
    "nan": (not_finite, ["--no-check-data"], r"img-tokens-00000003\.npy: has values that are not finite"),
    "shape": (save(3, np.zeros((32, 17), np.float16)), [], r"-00000003\.npy: shape \(32, 17\); dataset.json says"),
    "other images": (other_image, [], r"copy/tokens: these tokens were made of other images"),
    "encoder": (None, ["--enc-type", "dinov2-vit-b"], f"written by --enc-type {ENCODER}, but --enc-type is dinov2-v"),
    "two": (None, ["--enc-type", f"{ENCODER},{ENCODER}"], f"were written by --enc-type {ENCODER}, but --enc-type is"),
    "none": (None, ["--enc-type", "none", "--no-cls-token"], "--cached-tokens tokens: neither class slot nor alignm"),
    "patches": (None, ["--model", "SiT-S/8"], r"tokens has 16 patch tokens, but there are 4 latent tokens"),
    "path": (None, ["--cached-tokens", "a/b"], "--cached-tokens a/b: must be names, without paths"),
}


@pytest.mark.parametrize("case", BAD)
def test_each_fault_is_one_clear_error(flags, copy, case):
    spoil, more, message = BAD[case]
    if spoil:
        spoil(copy / "tokens")
    with pytest.raises(InputError, match=message) as caught:
        run_training([*replaced(flags, "--data-dir", copy), "--cached-tokens", "tokens", *more])
    assert "\n" not in str(caught.value).replace("1 broken files:\n", "")


def test_mirrored_tokens_are_needed_for_flip(flags, copy):
    change_json(copy / "tokens", lambda content: content.update(flip=False))
    with pytest.raises(InputError, match=r"--flip: .*tokens has no tokens of the mirrored images; preprocessing/enc"):
        run_training([*replaced(flags, "--data-dir", copy), "--cached-tokens", "tokens", "--flip"])


def test_other_weights_are_refused_on_resume(flags, copy, tmp_path):
    flags = [*flags, "--cached-tokens", "tokens"]
    run_training(flags)
    encoder_field("weights", "0" * 64)(copy / "tokens")
    with pytest.raises(InputError, match="--cached-tokens tokens: these are not the encoder weights of the run"):
        run_training([*replaced(flags, "--data-dir", copy), "--resume", "latest", "--max-train-steps", "5"])


def test_an_evaluation_loads_the_first_encoder(flags, encoder_weights, monkeypatch):
    monkeypatch.setattr("training.setup.TrainingEvaluation", lambda *arguments: arguments)
    flags = [*flags, "--cached-tokens", "tokens,second", "--eval-steps", "4", "--eval-ref", "ref.npz"]
    reset_accelerate()
    run = train.set_up(train.parse_args([*flags, "--enc-weights", f"{encoder_weights},"]))
    (encoder,) = run.encoders
    assert encoder.name == ENCODER and encoder in run.evaluation
    assert sampling.class_centres(run).isfinite().all()
    train.training_step(run, train.load_batches(run, range(1)))


def test_an_evaluation_refuses_other_weights(flags, tmp_path):
    other = write_encoder(tmp_path / "other.safetensors")
    state = load_file(other)
    state["norm.bias"] += 1
    save_file(state, other)
    flags = [*flags, "--cached-tokens", "tokens", "--eval-steps", "4", "--eval-ref", "ref.npz"]
    with pytest.raises(InputError, match=r"--eval-steps 4: timm/.*, .*other\.safetensors, is not the encoder that"):
        run_training([*flags, "--enc-weights", str(other)])
