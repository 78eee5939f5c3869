"""Frozen encoders: layouts of weights, preprocessing, and errors for unusable weights."""

import io
import json
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from common.errors import InputError
from models import encoders
from models.checksums import write_checksum
from models.encoder_table import TOKENS
from models.encoders import ENCODERS, load_encoder, load_encoders
from tests.conftest import read_rows, run_training

ASSETS = os.environ.get("REG_ASSETS")
TINY_VIT = "timm/vit_tiny_patch16_224:depth=2"
TIMM_AND_META = ("timm.safetensors", "meta.pth")


def random_images(count: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def save_timm(path: Path, model: str, **options) -> torch.nn.Module:
    """Save a timm model with random weights and biases, and return it."""
    torch.manual_seed(0)
    network = timm.create_model(model, **options).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_file(network.state_dict(), path)
    return network


def meta_layout(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return DINOv2 parameters as Meta publishes them, with the mask token of its training."""
    return {**parameters, "mask_token": torch.zeros(1, parameters["norm.weight"].numel())}


def test_preprocessing_normalises_then_resizes_without_antialias(tmp_path):
    network = save_timm(tmp_path / "vit.safetensors", "vit_tiny_patch16_224", depth=2, img_size=96, num_classes=0)
    spec = f"{TINY_VIT}:input=96:mean=0.485/0.456/0.406:std=0.229/0.224/0.225"
    encoder = load_encoder(spec, 256, tmp_path / "vit.safetensors")
    images = random_images()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        features = network.forward_features(F.interpolate(pixels, (96, 96), mode="bicubic"))
    output = encoder(images)
    torch.testing.assert_close(output.cls_token, features[:, 0])
    torch.testing.assert_close(output.patch_tokens, features[:, 1:])
    assert output.cls_token.dtype == torch.float32


def test_meta_layout_equals_timm_layout_with_the_position_table_resampled(tmp_path):
    from timm.layers import resample_abs_pos_embed

    network = save_timm(tmp_path / "timm.safetensors", "vit_small_patch14_dinov2.lvd142m", depth=2)
    assert network.pos_embed.shape == (1, 1 + 37 * 37, 384)
    torch.save(meta_layout(network.state_dict()), tmp_path / "meta.pth")
    ours, metas = (load_encoder("dinov2-vit-s:depth=2", 256, tmp_path / name) for name in TIMM_AND_META)
    table = resample_abs_pos_embed(network.pos_embed, [16, 16])
    torch.testing.assert_close(metas.network.pos_embed, table)
    images = random_images()
    for ours_tensor, metas_tensor in zip(ours(images), metas(images), strict=True):
        assert torch.equal(ours_tensor, metas_tensor)


def test_meta_layout_with_registers_drops_them_from_the_tokens(tmp_path):
    network = save_timm(tmp_path / "timm.safetensors", "vit_small_patch14_reg4_dinov2.lvd142m", depth=2)
    parameters = meta_layout(network.state_dict())
    # Meta adds the first row of the position table to the class token; timm's checkpoint contains the sum.
    parameters["register_tokens"] = parameters.pop("reg_token")
    parameters["pos_embed"] = torch.cat([torch.ones(1, 1, 384), parameters["pos_embed"]], dim=1)
    parameters["cls_token"] = parameters["cls_token"] - 1
    torch.save(parameters, tmp_path / "meta.pth")
    spec = "dinov2reg-vit-s:depth=2"
    ours, metas = (load_encoder(spec, 256, tmp_path / name)(random_images()) for name in TIMM_AND_META)
    assert ours.patch_tokens.shape == (2, 256, 384)
    torch.testing.assert_close(tuple(ours), tuple(metas))


def test_moco_checkpoint_gives_its_base_encoder(tmp_path):
    network = save_timm(tmp_path / "timm.safetensors", "vit_base_patch16_224", depth=1, num_classes=0)
    base = {f"module.base_encoder.{key}": value for key, value in network.state_dict().items()}
    other = {key.replace("base", "momentum"): value + 1 for key, value in base.items()}
    head = {"module.base_encoder.head.0.weight": torch.zeros(8, 768), "module.predictor.0.weight": torch.zeros(8, 8)}
    torch.save({"epoch": 300, "state_dict": {**base, **other, **head}}, tmp_path / "moco.pth.tar")
    images = random_images()
    moco = load_encoder("mocov3-vit-b:depth=1", 256, tmp_path / "moco.pth.tar")(images)
    ours = load_encoder("mocov3-vit-b:depth=1", 256, tmp_path / "timm.safetensors")(images)
    assert torch.equal(moco.cls_token, ours.cls_token) and torch.equal(moco.patch_tokens, ours.patch_tokens)


SIZES = {"depth": 1, "embed_dim": 96, "num_heads": 3}  # so that the networks are built quickly
SMALL = ":".join(f"{key}={value}" for key, value in SIZES.items())
BY_TOKENS = {"clip-vit-b": encoders.BEFORE_NORM, "mae-vit-b": encoders.BEFORE_NORM, "dinov1-vit-b": encoders.AFTER_NORM}


@pytest.mark.parametrize("name", BY_TOKENS)
def test_patch_tokens_are_taken_where_repa_takes_them(tmp_path, name):
    """For CLIP and MAE before the last norm, by default; the class token after it in each case."""
    network = save_timm(tmp_path / "w.safetensors", ENCODERS[name].model, **SIZES, img_size=64, num_classes=0)
    images = random_images()

    def encoded(tokens):
        return load_encoder(f"{name}:{SMALL}:input=64{tokens}", 256, tmp_path / "w.safetensors")(images)

    line = encoders._resolve(name, 256)[0]
    cfg = encoders._pretrained_cfg(line.model)
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (cfg.mean, cfg.std))
    seen = []
    network.norm.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    with torch.no_grad():
        network.forward_features((images / 255 - mean) / std)
    before, after = seen
    assert (before - after).abs().mean() > 0.01
    for tokens, expected in (("", BY_TOKENS[name]), *((f":tokens={value}", value) for value in TOKENS)):
        output = encoded(tokens)
        patches = before if expected == encoders.BEFORE_NORM else after
        torch.testing.assert_close(output.patch_tokens, patches[:, 1:])
        torch.testing.assert_close(output.cls_token, after[:, 0])


def test_a_pooled_class_token_does_not_depend_on_where_tokens_are_taken(tmp_path):
    save_timm(tmp_path / "w.safetensors", "vit_base_patch16_siglip_256", depth=1)
    before, after = (
        load_encoder(f"timm/vit_base_patch16_siglip_256:depth=1:tokens={tokens}", 256, tmp_path / "w.safetensors")(
            random_images()
        )
        for tokens in TOKENS
    )
    torch.testing.assert_close(before.cls_token, after.cls_token)
    assert (before.patch_tokens - after.patch_tokens).abs().mean() > 0.01


@pytest.mark.parametrize("network, text", [("resnet18", "no norm"), ("swin_tiny_patch4_window7_224", "a feature map")])
def test_a_network_without_a_last_norm_of_tokens_has_no_tokens_before_it(network, text):
    with torch.device("meta"), pytest.raises(InputError, match=f"tokens=before-norm, but the network has {text}"):
        encoders.untrained_encoder(f"timm/{network}:tokens=before-norm", 256, "meta")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_openai_layout_of_clip_equals_timm_layout(tmp_path, prefix):
    network = save_timm(tmp_path / "timm.safetensors", ENCODERS["clip-vit-b"].model, **SIZES)
    swaps = {
        "patch_embed.proj": "conv1", "norm_pre": "ln_pre", "blocks.": "transformer.resblocks.", "norm1": "ln_1",
        "norm2": "ln_2", "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj", "cls_token": "class_embedding", "pos_embed": "positional_embedding",
    }  # fmt: skip
    openai = {f"{prefix}visual.proj": torch.zeros(96, 512), f"{prefix}logit_scale": torch.tensor(1.0)}
    for name, value in network.state_dict().items():
        if name.startswith("head."):
            continue
        for ours, theirs in swaps.items():
            name = name.replace(ours, theirs)
        name = "ln_post" + name.removeprefix("norm") if name.startswith("norm.") else name
        openai[f"{prefix}visual.{name}"] = value.squeeze(0) if "embedding" in name else value
    openai[f"{prefix}visual.class_embedding"] = openai[f"{prefix}visual.class_embedding"].flatten()
    torch.save({**openai, f"{prefix}transformer.resblocks.0.ln_1.bias": torch.zeros(2)}, tmp_path / "openai.pt")
    ours, theirs = (
        load_encoder(f"clip-vit-b:{SMALL}", 256, tmp_path / name)(random_images())
        for name in ("timm.safetensors", "openai.pt")
    )
    assert torch.equal(ours.cls_token, theirs.cls_token) and torch.equal(ours.patch_tokens, theirs.patch_tokens)


@pytest.mark.parametrize(
    ("spec", "width", "num_tokens"),
    [
        ("timm/resnet18", 512, 64),
        ("timm/swin_tiny_patch4_window7_224", 768, 49),  # channels last
        ("timm/vit_base_patch16_siglip_256:depth=1", 768, 256),  # attention pool
        ("timm/beit_base_patch16_224:depth=1", 768, 196),  # final norm after the pooling
        ("timm/mobilenetv3_small_050", 288, 64),  # a head that changes the width
    ],
)
def test_any_timm_model_has_tokens_and_a_vector_of_the_same_width(spec, width, num_tokens, tmp_path):
    name, *options = spec.removeprefix("timm/").split(":")
    save_timm(tmp_path / "w.safetensors", name, **({"depth": 1} if options else {}))
    spec += ":input=256" if num_tokens == 64 else ""
    encoder = load_encoder(spec, 256, tmp_path / "w.safetensors")
    output = encoder(random_images())
    assert output.cls_token.shape == (2, width) and output.patch_tokens.shape == (2, num_tokens, width)
    assert (encoder.width, encoder.num_tokens) == (width, num_tokens)
    assert output.cls_token.isfinite().all() and output.patch_tokens.isfinite().all()


def test_tokens_of_a_feature_map_are_row_major_and_the_vector_is_their_mean(tmp_path):
    network = save_timm(tmp_path / "w.safetensors", "resnet18")
    encoder = load_encoder("timm/resnet18:input=128", 256, tmp_path / "w.safetensors")
    images = random_images(size=128)
    feature_map = network.forward_features((images / 255 - encoder.mean) / encoder.std)
    output = encoder(images)
    torch.testing.assert_close(output.patch_tokens[:, 4 * 1 + 2], feature_map[:, :, 1, 2])
    torch.testing.assert_close(output.cls_token, feature_map.mean((2, 3)))


HALF = {torch.bfloat16: 2e-2, torch.float16: 3e-3}  # relative tolerances; each is about 3 times what was measured


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "spec",
    [
        f"clip-vit-b:{SMALL}:input=96",  # the last norm lies outside the network
        f"dinov2reg-vit-b:{SMALL}:input=56",
        f"timm/vit_base_patch16_siglip_256:{SMALL}:input=64",  # attention pool
        "timm/beit_base_patch16_224:depth=1:embed_dim=96:num_heads=3",  # final norm after the pooling
        "timm/resnet18:input=64",
    ],
)
def test_half_precision_changes_only_rounding(spec, dtype):
    torch.manual_seed(0)
    encoder = encoders.untrained_encoder(spec, 256)
    for parameter in encoder.parameters():  # some are so small at first that float16 has few bits for them
        parameter.add_(0.02 * torch.randn_like(parameter))
    images, inputs = random_images(), []
    expected = encoder(images)
    pixels = (images.float() / 255 - encoder.mean) / encoder.std
    if encoder.input_size != 64:
        pixels = F.interpolate(pixels, (encoder.input_size,) * 2, mode="bicubic")
    assert encoder.convert(dtype) is encoder and encoder.mean.dtype == encoder.std.dtype == torch.float32
    assert {parameter.dtype for parameter in encoder.parameters()} == {dtype}
    forward_features = encoder.network.forward_features
    encoder.network.forward_features = lambda pixels: forward_features(inputs.append(pixels) or pixels)
    output = encoder(images)
    assert torch.equal(inputs[0], pixels.to(dtype))  # normalized and resized in float32
    for ours, full in zip(output, expected, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < (ours - full).norm() / full.norm() < HALF[dtype]
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, encoder(images), output))


def test_weights_that_are_too_large_for_half_precision_are_refused():
    encoder = encoders.untrained_encoder(f"dinov1-vit-b:{SMALL}:input=64", 256)
    torch.nn.init.constant_(encoder.network.norm.bias, 1e5)
    with pytest.raises(InputError, match=r"encoder dinov1-vit-b.*: weights converted to float16: network\.norm\.bias"):
        encoder.convert(torch.float16)


def test_a_run_records_the_dtype_of_the_encoders_and_may_change_it(train_flags):
    flags = [*train_flags, "--exp-name", "run", "--mixed-precision", "bf16"]
    run = run_training([*flags, "--encoder-dtype", "bf16", "--max-train-steps", "1"])
    assert json.loads((run / "args.json").read_text())["encoder_dtype"] == "bf16"
    run_training([*flags, "--resume", "latest", "--max-train-steps", "2"])
    assert json.loads((run / "args.json").read_text())["encoder_dtype"] == "float32"
    run_training([*flags, "--exp-name", "other", "--max-train-steps", "1"])
    half, full = (read_rows(run.parent / name)[0] for name in ("run", "other"))
    assert half["loss"] != full["loss"] and half["loss"] == pytest.approx(full["loss"], rel=1e-2)


def test_encoder_stays_frozen_inside_a_training_module(tmp_path):
    save_timm(tmp_path / "w.safetensors", "resnet18")
    encoder = load_encoder("timm/resnet18", 256, tmp_path / "w.safetensors")
    torch.nn.ModuleList([encoder]).train()
    before = encoder.network.bn1.running_mean.clone()
    output = encoder(random_images())
    assert torch.equal(encoder.network.bn1.running_mean, before) and not output.cls_token.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_several_encoders_and_the_number_of_tokens(tmp_path):
    save_timm(tmp_path / "a.safetensors", "vit_tiny_patch16_224", depth=2)
    save_timm(tmp_path / "b.safetensors", "resnet18")
    specs, files = (
        f"{TINY_VIT}:input=128, timm/resnet18:input=256",
        f"{tmp_path}/a.safetensors,{tmp_path}/b.safetensors",
    )
    vit, resnet = load_encoders(specs, 256, files, num_tokens=64)
    assert (vit.width, resnet.width, vit.num_tokens, resnet.num_tokens) == (192, 512, 64, 64)
    with pytest.raises(InputError, match=r"64 tokens.* 256 latent tokens.*:input=256"):
        load_encoders(specs, 256, files, num_tokens=256)
    with pytest.raises(InputError, match=r"1 files for 2 encoders"):
        load_encoders(specs, 256, f"{tmp_path}/a.safetensors")


def test_the_input_that_an_error_names_gives_the_tokens(tmp_path):
    """At 112 px, a network of stride 32 pads its map to 4 x 4; 8 x 8 tokens need 256 px, not twice 112."""
    save_timm(tmp_path / "a.safetensors", "resnet18")
    with pytest.raises(InputError, match=r"16 tokens .* 112 px.*append :input=256 "):
        load_encoders("timm/resnet18:input=112", 128, f"{tmp_path}/a.safetensors", num_tokens=64)
    assert load_encoders("timm/resnet18:input=256", 128, f"{tmp_path}/a.safetensors", num_tokens=64)


def test_errors_name_unusable_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    network = save_timm(path, "vit_tiny_patch16_224", depth=2)
    with pytest.raises(InputError, match=r"depth_=2.*depth_"):
        load_encoder("timm/vit_tiny_patch16_224:depth_=2", 256, path)
    with pytest.raises(
        InputError,
        match=r"w\.safetensors: does not fit .*: missing: 12 \(blocks\.2\.attn\.proj\.bias, .* and 8 more\)$",
    ):
        load_encoder("timm/vit_tiny_patch16_224:depth=3", 256, path)
    with pytest.raises(
        InputError,
        match=r"w\.safetensors: does not fit .*: unexpected: 12 \(blocks\.1\.attn\.proj\.bias, .* and 8 more\)$",
    ):
        load_encoder("timm/vit_tiny_patch16_224:depth=1", 256, path)
    with pytest.raises(
        InputError, match=r"--enc-weights .*absent: no such file or folder; allowed: a safetensors or PyTorch file"
    ):
        load_encoder(TINY_VIT, 256, tmp_path / "absent")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(
        InputError, match=r"--enc-weights .*w\.safetensors: not a readable safetensors file; it is truncated"
    ):
        load_encoder(TINY_VIT, 256, path)
    for content in ({}, {"head.weight": torch.zeros(2, 2)}, torch.zeros(2)):
        torch.save(content, tmp_path / "empty.pth")
        with pytest.raises(InputError, match=r"empty\.pth: holds no parameters"):
            load_encoder(TINY_VIT, 256, tmp_path / "empty.pth")
    torch.save(network, tmp_path / "code.pth")
    with pytest.raises(
        InputError,
        match=r"--enc-weights .*code\.pth: refused, it holds timm\.models\.vision_transformer\.VisionTransformer; ",
    ):
        load_encoder(TINY_VIT, 256, tmp_path / "code.pth")


def test_weights_of_other_dtypes_and_numbers_that_are_not_finite_are_refused(tmp_path):
    state = save_timm(tmp_path / "w.safetensors", "vit_tiny_patch16_224", depth=1).state_dict()
    name = "blocks.0.mlp.fc1.weight"
    for changed, text in (
        (state[name].to(torch.int8), rf"odd\.pth: {name} has dtype int8; allowed for weights: float32"),
        (state[name].to(torch.complex64), rf"odd\.pth: {name} has dtype complex64"),
        (state[name] * torch.inf, rf"odd\.pth: {name} contains numbers that are not finite"),
        ("text", rf"odd\.pth: {name} in its weights is a str; expected a tensor"),
    ):
        torch.save({**state, name: changed}, tmp_path / "odd.pth")
        with pytest.raises(InputError, match=rf"--enc-weights .*{text}"):
            load_encoder("timm/vit_tiny_patch16_224:depth=1", 256, tmp_path / "odd.pth")


def test_weights_are_compared_with_their_checksum(tmp_path):
    save_timm(tmp_path / "w.safetensors", "vit_tiny_patch16_224", depth=2)
    write_checksum(tmp_path / "w.safetensors", "0" * 64)
    with pytest.raises(InputError, match=r"--enc-weights .*w\.safetensors: damaged; its SHA-256 is "):
        load_encoder(TINY_VIT, 256, tmp_path / "w.safetensors")


def test_a_name_cannot_describe_more_than_the_file_has(tmp_path):
    save_timm(tmp_path / "w.safetensors", "vit_tiny_patch16_224", depth=1)
    spec = "timm/vit_tiny_patch16_224:depth=256:embed_dim=4096:num_heads=16"
    with pytest.raises(InputError, match=r"its options describe more parameters than the file .*w\.safetensors has"):
        load_encoder(spec, 256, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"w\.safetensors: does not fit .*: this model has no option embed_dim"):
        load_encoder("timm/resnet18:embed_dim=32", 256, tmp_path / "w.safetensors")


def test_an_unreachable_hub_is_reported_at_once_with_the_missing_file(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(InputError, match=r"timm/vit_base_patch14_dinov2.*model\.safetensors.*--enc-weights"):
        load_encoder("dinov2-vit-b", 256)
    assert time.monotonic() - start < 15


def mobilenet(input_size: int) -> encoders.Encoder:
    weights = Path(ASSETS) / "encoder" / "mobilenetv1_075.timm.safetensors"
    spec = "timm/mobilenetv1_100:channel_multiplier=0.75:pad_type=same:bn_eps=0.001:mean=0.5:std=0.5"
    return load_encoder(f"{spec}:input={input_size}", 256, weights)


def photographs(archive_name: str, each: int, folders: int | None = None) -> torch.Tensor:
    """Return the first `each` photographs of every folder, resized to squares, uint8 (folders * each, 3, 256, 256)."""
    images, seen = [], {}
    with zipfile.ZipFile(Path(ASSETS) / archive_name) as archive:
        for name in sorted(name for name in archive.namelist() if name.lower().endswith((".jpeg", ".jpg"))):
            folder = Path(name).parent
            seen[folder] = seen.get(folder, 0) + 1
            if seen[folder] <= each and len(seen) <= (folders or len(seen)):
                image = Image.open(io.BytesIO(archive.read(name))).convert("RGB").resize((256, 256))
                images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(images)


@pytest.mark.assets
@pytest.mark.skipif(not ASSETS, reason="REG_ASSETS is not set")
def test_real_mobilenet_has_the_shape_of_dinov2_b_and_similar_vectors_within_classes():
    encoder = mobilenet(512)
    output = encoder(photographs("imagenette_train_224.zip", each=3, folders=5))
    assert (encoder.num_tokens, encoder.width) == (256, 768)
    assert output.patch_tokens.shape == (15, 256, 768) and output.patch_tokens.isfinite().all()
    torch.testing.assert_close(output.cls_token, output.patch_tokens.mean(1), rtol=1e-4, atol=1e-5)
    directions = F.normalize(output.cls_token - output.cls_token.mean(0), dim=1)
    agreement, labels = directions @ directions.T, torch.arange(5).repeat_interleave(3)
    same = (labels[:, None] == labels) & ~torch.eye(15, dtype=torch.bool)
    assert agreement[same].mean() > agreement[labels[:, None] != labels].mean()


@pytest.mark.assets
@pytest.mark.skipif(not ASSETS, reason="REG_ASSETS is not set")
def test_the_classifier_of_real_mobilenet_recognises_its_vectors():
    weights = load_file(Path(ASSETS) / "encoder" / "mobilenetv1_075.timm.safetensors")
    images = photographs("imagenet_samples.zip", each=1, folders=60)
    vectors = mobilenet(224)(images).cls_token
    guesses = (vectors @ weights["classifier.weight"].T + weights["classifier.bias"]).argmax(1)
    assert (guesses == 5 * torch.arange(60)).float().mean() > 0.7  # the photographs are of every fifth class
