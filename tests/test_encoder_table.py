"""The table of encoders, and names with options."""

import pytest
import timm
import torch

from common.errors import InputError
from models import encoders
from models.encoders import ENCODERS, load_encoder

WIDTHS = {"s": 384, "b": 768, "l": 1024, "L": 1024, "h": 1280, "g": 1536}


@pytest.mark.parametrize("name, resolution", [*((name, 256) for name in ENCODERS), ("dinov2-vit-s", 512)])
def test_every_line_of_the_table_gives_the_tokens_of_the_latents(name, resolution):
    line, input_size = encoders._resolve(name, resolution)
    with torch.device("meta"):
        encoder = encoders._build(name, line, input_size)
        output = encoder(torch.zeros(2, 3, resolution, resolution, dtype=torch.uint8))
    tokens, width = (resolution // 16) ** 2, WIDTHS[name[-1]]
    assert (encoder.num_tokens, encoder.width) == (tokens, width)
    assert (output.cls_token.shape, output.patch_tokens.shape) == ((2, width), (2, tokens, width))


def test_lines_name_published_weights():
    for line in ENCODERS.values():
        if not line.local_only:
            assert line.model in timm.list_models(pretrained=True)


def test_recorded_names_keep_their_meaning():
    """A record without the option is older than the option."""
    specs = "clip-vit-L, dinov2-vit-b,mae-vit-b:input=112,clip-vit-b:tokens=after-norm"
    now = (
        "clip-vit-L:tokens=before-norm,dinov2-vit-b,mae-vit-b:input=112:tokens=before-norm,clip-vit-b:tokens=after-norm"
    )
    assert encoders.name_with_tokens(specs) == now
    assert encoders.name_with_tokens(specs, encoders.AFTER_NORM) == now.replace("before", "after")
    assert encoders.name_with_tokens(now, encoders.AFTER_NORM) == now
    assert encoders.name_with_tokens("none") == "none"


def test_a_run_keeps_where_its_tokens_are_taken():
    from training.record import check_same_run

    for saved in ("clip-vit-b", "clip-vit-b:tokens=after-norm"):
        with pytest.raises(
            InputError, match=r"--enc-type is clip-vit-b:tokens=before-norm, .*clip-vit-b:tokens=after-norm"
        ):
            check_same_run({"enc_type": "clip-vit-b"}, {"enc_type": saved}, "run")
        check_same_run({"enc_type": "clip-vit-b:tokens=after-norm"}, {"enc_type": saved}, "run")
    check_same_run({"enc_type": "clip-vit-b"}, {"enc_type": "clip-vit-b:tokens=before-norm"}, "run")
    check_same_run({"enc_type": "dinov2-vit-b"}, {"enc_type": "dinov2-vit-b"}, "run")


def test_mocov3_s_has_heads_of_32():
    """MoCo v3 (arXiv 2104.02057, appendix) trained a ViT-S with 12 heads."""
    with torch.device("meta"):
        attention = encoders._build("mocov3-vit-s", *encoders._resolve("mocov3-vit-s", 256)).network.blocks[0].attn
    assert (attention.num_heads, attention.head_dim) == (12, 32)


def test_input_follows_the_resolution_unless_given():
    assert encoders._resolve("dinov2-vit-b", 512)[1] == 448
    assert encoders._resolve("timm/resnet18", 128)[1] == 112
    assert encoders._resolve("timm/resnet18:input=512", 128)[1] == 512
    with pytest.raises(InputError, match=r"not a whole number of px at resolution 100"):
        encoders._resolve("dinov2-vit-b", 100)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dinov2-vitb", "did you mean dinov2-vit-b"),
        ("dinov2", "did you mean dinov2-vit-b or dinov2-vit-s or"),
        ("dino", "unknown; allowed: dinov2-vit-b, "),
        ("clip-vit-b:tokens=before", "tokens=before; allowed: before-norm, after-norm"),
        ("clip-vit-l", "did you mean clip-vit-L"),
        ("timm/vit_smal_patch14_dinov2", "did you mean vit_small_patch14_dinov2"),
        ("timm/resnet18:input", "option 'input'; allowed: key=value"),
        ("timm/resnet18:input=big", "input=big; allowed: a whole number of px from 1 to 2048"),
        ("timm/resnet18:std=0", "std=0; allowed"),
        ("timm/resnet18:mean=nan", "mean=nan; allowed: one number, or three"),
        ("timm/resnet18:input=64:input=32", "option input is given twice"),
        ("timm/resnet18:checkpoint_path=w.pth", "option 'checkpoint_path' is unknown; allowed: input, mean, std, tok"),
        ("timm/resnet18:pretrained_cfg=w", "option 'pretrained_cfg' is unknown"),
        ("timm/vit_tiny_patch16_224:depth=1000000000", "depth=1000000000; allowed: a whole number from 0 to 256"),
        ("timm/vit_tiny_patch16_224:depth=2.5", "depth=2.5; allowed: a whole number"),
        ("timm/vit_tiny_patch16_224:mlp_ratio=nan", "mlp_ratio=nan; allowed: a number from 0 to 64"),
        ("timm/vit_tiny_patch16_224:class_token=maybe", "class_token=maybe; allowed: true, false"),
        ("timm/vit_tiny_patch16_224:patch_size=1:input=512", "input of 512 px has more than 256 patches in a row"),
        ("timm/hf-hub:owner/name", "no such model"),
        ("timm/local-dir:/tmp", "no such model"),
        ("mocov3-vit-b", "--enc-weights"),
    ],
)
def test_errors_for_unknown_encoders_suggest_a_solution(spec, message):
    with pytest.raises(InputError, match=message):
        load_encoder(spec, 256)
