"""The pipeline makes the images of generate.py, and takes, checks and returns what a diffusers pipeline does."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.classes import ClassSet
from common.errors import InputError
from common.io import read_json
from export import export
from models.autoencoder import PixelCodec, load_codec
from models.checkpoint import load_checkpoint, save_checkpoint
from models.interpolant import Interpolant
from samplers import Guidance, image_seeds, sample_images
from tests.conftest import run_generate
from tests.test_autoencoder import save_kl
from tests.test_checkpoint import content
from tests.test_sit import randomise, small

pytest.importorskip("diffusers")

from models.pipeline import REGPipeline

LABELS = [0, 1, 2, 0, 1]
GUIDED = {"guidance_scale": 2.0, "guidance_interval": (0, 0.85), "num_inference_steps": 4}
CLASSES = ClassSet((0, 2), ("tench", "jay"))


def write_checkpoint(path, codec, **more):
    """Write a checkpoint of a network of 3 classes on 8 x 8 latents."""
    network = randomise(small(in_channels=codec["channels"], num_classes=3)).eval()
    save_checkpoint(path, {**content(network, path_type="cosine", codec=codec), **more})
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "0000012.pt", PixelCodec().format.to_json())


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "0000012.pt"
    write_checkpoint(path, PixelCodec().format.to_json(), classes=CLASSES.to_json())
    pipeline = REGPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_pipeline_makes_the_images_of_generate(checkpoint, tmp_path, monkeypatch):
    export(checkpoint, tmp_path / "folder")
    pipeline = REGPipeline.from_pretrained(tmp_path / "folder").to("cpu")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(LABELS, seed=3, output_type="np", **GUIDED).images
    flags = ["--num-fid-samples", "5", "--label-sampling", "balanced", "--num-steps", "4", "--global-seed", "3"]
    flags += ["--cfg-scale", "2", "--guidance-high", "0.85", "--device", "cpu", "--sample-dir", str(tmp_path)]
    run_generate([*flags, "--ckpt", str(tmp_path / "folder"), "--name", "set"], monkeypatch)
    theirs = np.load(tmp_path / "set" / "samples.npz")["arr_0"]
    assert np.array_equal(images, theirs.astype(np.float32) / 255) and images.std() > 0
    half = pipeline.to(torch.bfloat16)(LABELS, seed=3, output_type="np", **GUIDED).images
    assert 0 < abs(half - images).mean() < 3 / 255
    assert pipeline.dtype == torch.bfloat16 and pipeline.transformer.t_embedder.mlp[0].weight.dtype == torch.float32


def test_path_drop_guidance_makes_the_images_of_generate(tmp_path, monkeypatch):
    codec = PixelCodec().format.to_json()
    network = small(in_channels=codec["channels"], num_classes=3, depth=5, sprint=True, cls_lead=0.3)
    network = randomise(network).eval()
    path = tmp_path / "0000012.pt"
    save_checkpoint(path, content(network, codec=codec, cls_lead=0.3))
    flags = ["--num-fid-samples", "3", "--label-sampling", "balanced", "--num-steps", "4", "--cfg-scale", "2"]
    flags += ["--device", "cpu", "--ckpt", str(path), "--sample-dir", str(tmp_path), "--guidance-high", "0.85"]
    run_generate([*flags, "--path-drop-guidance", "--name", "set"], monkeypatch)
    settings = read_json(tmp_path / "set" / "samples.json")
    theirs = np.load(tmp_path / "set" / "samples.npz")["arr_0"]
    with pytest.raises(InputError, match="made with --path-drop-guidance True, not --path-drop-guidance False"):
        run_generate([*flags, "--name", "set"], monkeypatch)
    pipeline = REGPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    ours, full = (
        pipeline([0, 1, 2], seed=0, output_type="np", **GUIDED, path_drop_guidance=drop).images
        for drop in (True, False)
    )
    assert settings["path_drop_guidance"] is True and np.array_equal(ours, theirs.astype(np.float32) / 255)
    assert abs(ours - full).mean() > 1 / 255
    with pytest.warns(UserWarning, match="path_drop_guidance has no effect: only guidance_scale above 1"):
        pipeline(0, path_drop_guidance=True, num_inference_steps=1)
    assert pipeline.to(torch.bfloat16).transformer.t_cls_embedder.mlp[0].weight.dtype == torch.float32


def test_without_labels_the_pipeline_makes_the_images_of_generate(tmp_path, monkeypatch):
    codec = PixelCodec().format.to_json()
    network = randomise(small(in_channels=codec["channels"], num_classes=3)).eval()
    save_checkpoint(tmp_path / "0000012.pt", content(network, codec=codec, cfg_prob=1.0))
    export(tmp_path / "0000012.pt", tmp_path / "folder")
    flags = ["--num-fid-samples", "2", "--num-steps", "4", "--device", "cpu", "--sample-dir", str(tmp_path)]
    run_generate([*flags, "--ckpt", str(tmp_path / "folder"), "--name", "set"], monkeypatch)
    theirs = np.load(tmp_path / "set" / "samples.npz")["arr_0"].astype(np.float32) / 255
    pipeline = REGPipeline.from_pretrained(tmp_path / "folder")
    pipeline.save_pretrained(tmp_path / "saved")
    for one in (pipeline, REGPipeline.from_pretrained(tmp_path / "saved")):
        one.set_progress_bar_config(disable=True)
        assert np.array_equal(one(num_images=2, num_inference_steps=4, output_type="np").images, theirs)
    assert len(pipeline(num_inference_steps=1).images) == 1
    for options, text in (
        ({"class_labels": [0, 2]}, r"class_labels is \[0, 2\], but this network was trained without labels"),
        ({"guidance_scale": 2.0}, "guidance_scale is 2, but this network was trained without labels"),
        ({"num_images": 0}, "num_images is 0; allowed: whole numbers from 1"),
    ):
        with pytest.raises(ValueError, match=text):
            pipeline(num_inference_steps=1, **options)


def test_output_types_are_those_of_diffusers(pipeline):
    outputs = {
        name: pipeline([0, 2, 0, 0, 2], output_type=name, **GUIDED).images for name in ("pil", "np", "pt", "latent")
    }
    assert [image.size for image in outputs["pil"]] == [(8, 8)] * 5 and isinstance(outputs["pil"][0], Image.Image)
    array, tensor, latents = outputs["np"], outputs["pt"], outputs["latent"]
    assert array.shape == (5, 8, 8, 3) and array.dtype == np.float32 and 0 <= array.min() < array.max() <= 1
    assert tensor.shape == (5, 3, 8, 8) and tensor.dtype == torch.float32
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal((array * 255).round().astype(np.uint8), np.stack([np.array(i) for i in outputs["pil"]]))
    assert latents.shape == (5, 3, 8, 8) and latents.dtype == torch.float32
    assert torch.equal(pipeline.vae.decode(latents).float() / 255, tensor)
    assert not tensor.is_inference()  # so that gradients of a loss on it can be computed
    (images,) = pipeline([0, 2, 0, 0, 2], output_type="pt", return_dict=False, **GUIDED)
    assert torch.equal(images, tensor)


@pytest.mark.parametrize(
    ("given", "labels"),
    [(2, [2]), ([0, 2], [0, 2]), (torch.tensor([2, 0]), [2, 0]), (torch.tensor(2), [2]), (np.array([0, 2]), [0, 2]),
     ([torch.tensor(2), 0], [2, 0]), (np.int64(2), [2]), (range(1), [0]), ("jay", [2]),
     (["jay", 0, "tench"], [2, 0, 0]), ("0,jay", [0, 2])],
)  # fmt: skip
def test_labels_are_numbers_or_names(pipeline, given, labels):
    assert pipeline._labels(given) == labels


@pytest.mark.parametrize("given", [3, -1, [0, 3], torch.tensor([3]), 1.0, torch.tensor([0.5]), True, [[0, 1]], None])
def test_a_label_that_the_network_lacks_is_refused(pipeline, given):
    with pytest.raises(ValueError, match=r"class_labels has .*; allowed: whole numbers 0 \.\. 2, and class names"):
        pipeline(given, **GUIDED)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": "jai"}, "names are jay"),
        ({"num_images": 2}, "num_images is 2, but class_labels decides it for this network"),
        ({"guidance_interval": (0.85, 0.0)}, "guidance interval 0.85 .. 0.0"),
        ({"guidance_interval": 0.85}, "guidance_interval 0.85: must be a pair"),
        ({"guidance_scale": 0}, "guidance scale 0: must be 1"),
        ({"guidance_scale": 0.5}, "guidance scale 0.5: must be 1"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"mode": "dde"}, "mode 'dde' is unknown"),
        ({"solver": "heun"}, "'heun' is a solver of the ODE"),
        ({"path_drop_guidance": True}, "path_drop_guidance: needs a network with SPRINT"),
        ({"output_type": "jpeg"}, "output_type 'jpeg' is unknown; allowed: pil, np, pt, latent"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 0, "generator": torch.Generator()}, "seed and generator are both given"),
        ({"generator": [torch.Generator()]}, "generator is a list of 1, but there are 2 images"),
        ({"generator": 3}, "generator is 3; expected a torch.Generator"),
    ],
)
def test_arguments_that_are_not_allowed(pipeline, options, text):
    with pytest.raises(ValueError, match=text):
        pipeline(**{"class_labels": [0, 2], **GUIDED, **options})


def test_labels_without_training_data_are_warned_of(pipeline):
    with pytest.warns(UserWarning, match="class_labels: label 1 does not occur in the training data"):
        pipeline(1, num_inference_steps=1)


def test_a_scale_of_the_class_token_without_effect_is_warned_of(pipeline):
    with pytest.warns(UserWarning, match=r"cls_guidance_scale 2 has no effect: only guidance_scale above 1"):
        pipeline(0, cls_guidance_scale=2.0, num_inference_steps=1)


def test_a_generator_decides_the_noise(pipeline):
    def images(generator, labels=(0, 2)):
        return pipeline(list(labels), generator=generator, output_type="pt", **GUIDED).images

    one, other = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    first, second = images(one), images(one)
    assert torch.equal(first, images(torch.Generator().manual_seed(0)))
    assert not torch.equal(first, second) and not torch.equal(first, images(other))
    listed = images([torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)])
    for number, (label, seed) in enumerate([(0, 5), (2, 6)]):
        torch.testing.assert_close(
            listed[number], images(torch.Generator().manual_seed(seed), [label])[0], atol=0.005, rtol=0
        )
    by_seed = pipeline([0, 2], seed=0, output_type="pt", **GUIDED).images
    assert torch.equal(by_seed, pipeline([0, 2], output_type="pt", **GUIDED).images)


def test_the_bar_counts_steps_and_can_be_configured(pipeline, monkeypatch):
    counted = []
    bar = type(pipeline.progress_bar(total=1))
    monkeypatch.setattr(bar, "update", lambda self, n=1: counted.append(self.total))
    monkeypatch.setattr("models.pipeline.BATCH_SIZE", 2)
    pipeline([0, 2, 0], **GUIDED)
    assert counted == [8] * 8  # two batches of 4 steps


def test_it_has_what_diffusers_pipelines_have(pipeline):
    assert set(pipeline.components) == {"transformer", "vae"} and "REGPipeline" in repr(pipeline)
    assert pipeline.device == torch.device("cpu") and pipeline.dtype == torch.float32
    assert pipeline.config.path_type == "cosine"
    again = REGPipeline(**pipeline.components, path_type="cosine")
    assert again.classes == ClassSet.of_network(3)


@pytest.mark.parametrize("kind", ["pixel", "kl"])
def test_a_saved_pipeline_is_complete(tmp_path, kind):
    if kind == "kl":
        save_kl(tmp_path / "codec")
    codec = load_codec(str(tmp_path / "codec") if kind == "kl" else "pixel")
    path = write_checkpoint(tmp_path / "0000012.pt", codec.format.to_json(), classes=CLASSES.to_json())
    first = REGPipeline.from_pretrained(path)
    first.set_progress_bar_config(disable=True)
    first.save_pretrained(tmp_path / "saved")
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    if kind == "kl":
        (tmp_path / "codec").rename(tmp_path / "gone")
    assert str(tmp_path) not in (moved / "config.json").read_text()
    second = REGPipeline.from_pretrained(moved)
    second.set_progress_bar_config(disable=True)
    assert second.classes == CLASSES and second.config.path_type == "cosine"
    a, b = (pipeline([0, 2], output_type="pt", **GUIDED).images for pipeline in (first, second))
    assert torch.equal(a, b)
    assert load_checkpoint(moved)["steps"] == 12
    second.save_pretrained(tmp_path / "again")  # also of a loaded one
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (moved / "config.json").read_text()
    )


def test_a_pipeline_replaces_only_an_export(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    pipeline.save_pretrained(tmp_path / "saved")
    for number, (name, text) in enumerate([("config.json", "{}"), ("model.safetensors", ""), ("vae/x", "")]):
        path = tmp_path / str(number) / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        with pytest.raises(InputError, match=r"save_directory .*(is not of an exported network|choose another folder)"):
            pipeline.save_pretrained(tmp_path / str(number))
        assert path.read_text() == text and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("by_saving", [False, True])
def test_an_upload_carries_everything(pipeline, tmp_path, monkeypatch, by_saving):
    from diffusers.utils import hub_utils

    uploaded = {}

    def upload_folder(repo_id, folder_path, **_):
        uploaded[repo_id] = sorted(str(p.relative_to(folder_path)) for p in type(tmp_path)(folder_path).rglob("*"))

    class Repository:
        repo_id = "owner/reg"

    monkeypatch.setattr(hub_utils, "create_repo", lambda *_, **__: Repository)
    monkeypatch.setattr(hub_utils, "upload_folder", upload_folder)
    card = type("Card", (), {"save": lambda self, path: None})()
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *_, **__: card)
    monkeypatch.setattr(hub_utils, "populate_model_card", lambda card: card)
    if by_saving:
        pipeline.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="owner/reg", private=True)
    else:
        pipeline.push_to_hub("owner/reg")
    assert uploaded == {"owner/reg": ["checksums.sha256", "config.json", "model.safetensors"]}


def test_an_export_on_the_hub_brings_its_codec(tmp_path, monkeypatch):
    save_kl(tmp_path / "codec")
    codec = load_codec(str(tmp_path / "codec"))
    export(write_checkpoint(tmp_path / "0000012.pt", codec.format.to_json()), tmp_path / "folder")
    asked = []
    monkeypatch.setattr("models.hub.hub_file", lambda repo, name, _: asked.append(name) or tmp_path / "folder" / name)
    assert REGPipeline.from_pretrained("owner/name").vae.format.channels == codec.format.channels
    assert asked[:2] == ["config.json", "model.safetensors"] and all(name.startswith("vae/") for name in asked[2:])
    assert len(asked) == 4


def test_a_codec_that_was_not_exported_has_to_be_named(tmp_path, capsys):
    save_kl(tmp_path / "codec")
    codec = load_codec(str(tmp_path / "codec"))
    export(write_checkpoint(tmp_path / "0000012.pt", codec.format.to_json()), tmp_path / "one.safetensors")
    assert f"codec {codec.format.codec} is not exported, because one file cannot contain it" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"local folder codec of the machine .* is not part of the export"):
        REGPipeline.from_pretrained(tmp_path / "one.safetensors")
    named = REGPipeline.from_pretrained(tmp_path / "one.safetensors", vae=str(tmp_path / "codec"))
    assert named.vae.format == codec.format


def test_a_half_precision_pipeline_is_loaded(checkpoint):
    pipeline = REGPipeline.from_pretrained(checkpoint, torch_dtype=torch.bfloat16)
    assert pipeline.transformer.dtype == torch.bfloat16


def test_the_pipeline_samples_with_the_time_shift_of_the_training(tmp_path):
    path = write_checkpoint(tmp_path / "0000012.pt", PixelCodec().format.to_json())
    shifted = load_checkpoint(path)
    shifted["args"].time_shift = 2.5
    save_checkpoint(tmp_path / "0000013.pt", shifted)
    pipeline = REGPipeline.from_pretrained(tmp_path / "0000013.pt")
    pipeline.save_pretrained(tmp_path / "saved")
    plain, again = (REGPipeline.from_pretrained(place) for place in (path, tmp_path / "saved"))
    for one in (plain, pipeline, again):
        one.set_progress_bar_config(disable=True)
    images = [one([0], seed=3, output_type="latent", **GUIDED).images for one in (plain, pipeline, again)]
    seeds = image_seeds(3, range(1))
    given = (pipeline.transformer, [0], seeds, Interpolant("cosine", 2.5), Guidance(2.0, 2.0, 0, 0.85))
    expected, _ = sample_images(*given, num_steps=4)
    assert torch.equal(images[1], expected.float()) and torch.equal(images[1], images[2])
    assert not torch.equal(images[0], images[1]) and again.config.time_shift == 2.5 and plain.config.time_shift == 1
