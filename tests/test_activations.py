"""The counted memory of a backward pass is that of a real one."""

from dataclasses import replace

import pytest
import torch

from loss import Draws, REGLoss, Targets
from models.interpolant import Interpolant
from models.sit import SiT, SiTConfig
from training.activations import DTYPES, count_activations, kept_tensors

SMALL = SiTConfig(
    input_size=8, hidden_size=32, depth=3, num_heads=2, encoder_depth=2, projector_dim=16, num_classes=5, z_dims=(8, 12)
)
SLOTS = {
    "class": SMALL,
    "learnable": replace(SMALL, cls_token_dim=None, learnable_token=True),
    "REPA, normalized queries": replace(SMALL, cls_token_dim=None, qk_norm=True),
    "SiT": replace(SMALL, cls_token_dim=None, z_dims=()),
    "two depths": replace(SMALL, encoder_depth=(1, 3)),
    "class token leads": replace(SMALL, cls_lead=0.3),
    "convolutions": replace(SMALL, encoder_depth=(2, 3), projector="conv"),
}
IMAGES = 5


def loss_of(model, images, device, weights):
    config = model.config
    latents = (images, config.in_channels, config.input_size, config.input_size)
    tokens = (config.input_size // config.patch_size) ** 2 + bool(config.cls_token_dim or config.learnable_token)
    with torch.device(device):
        cls_token = torch.randn(images, config.cls_token_dim) if config.cls_token_dim else None
        targets = Targets(cls_token, [torch.randn(images, tokens, width) for width in config.z_dims])
        drop = torch.zeros(images, dtype=torch.bool)
        draws = Draws(torch.rand(images), torch.randn(latents), torch.randn(latents), drop, cls_token)
        y = torch.zeros(images, dtype=torch.int64)
        criterion = REGLoss(Interpolant("linear"), weights, config.cls_lead)
        return criterion(model, torch.randn(latents), y, targets, draws)["loss"].mean()


def kept_bytes(model, precision, device="cpu", images=IMAGES, weights=None):
    dtype = DTYPES.get(precision)
    with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None), kept_tensors(model) as kept:
        loss = loss_of(model, images, device, weights or {})
    return sum(storage.nbytes() for storage in kept.values()), loss


def without_temporaries(found, images=IMAGES):
    return found.peak(images, checkpointing=False) - found.block.of(images)


@pytest.mark.parametrize("slot", SLOTS)
def test_the_count_is_what_a_real_forward_pass_keeps(slot):
    network = SLOTS[slot]
    found = count_activations(network, "no", fused_attn=False, device_type="cpu")
    assert without_temporaries(found) == kept_bytes(SiT(network, fused_attn=False), "no")[0]
    fused = count_activations(network, "no", device_type="cpu")
    more = without_temporaries(fused) - kept_bytes(SiT(network), "no")[0]
    assert 0 <= more <= 32 * network.depth  # seeds of CUDA's kernel
    assert fused.block.per_image < found.block.per_image


def test_terms_that_a_run_adds_are_counted():
    weights, images = {"cfm": 0.05}, 6
    found = count_activations(SMALL, "no", fused_attn=False, device_type="cpu", loss_weights=weights)
    kept, _ = kept_bytes(SiT(SMALL, fused_attn=False), "no", images=images, weights=weights)
    assert without_temporaries(found, images) == kept
    added = found.rest.per_image - count_activations(SMALL, "no", fused_attn=False, device_type="cpu").rest.per_image
    assert added == 4 * 4 * 8 * 8  # the difference to the target of the other sample


def test_the_count_follows_autocast():
    found = count_activations(SMALL, "bf16", fused_attn=False, device_type="cpu")
    less = kept_bytes(SiT(SMALL, fused_attn=False), "bf16")[0] - without_temporaries(found)
    assert 0 <= less <= 4 * IMAGES  # on the CPU, fake statistics of `wg_norm` are bfloat16


def test_the_largest_network_keeps_102_gb_in_its_blocks_and_fits_no_card_of_80_gb():
    found = count_activations(SiTConfig(), "fp16")
    assert round(256 * 28 * found.block.per_image / 1e9) == 102
    assert found.block_input.of(256) == 256 * 257 * 1152 * 4
    assert found.peak(256, checkpointing=False) > 80e9 > 20e9 > found.peak(256, checkpointing=True)
    assert 256 * 28 * found.compiled("fp16").block.per_image > 76.5e9  # what inductor's partitioner keeps


def test_half_precision_takes_less_both_kinds_take_the_same_and_autocast_is_as_before():
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    full, half, brain = (count_activations(SMALL, precision) for precision in ("no", "fp16", "bf16"))
    assert half == brain and half.block.per_image < full.block.per_image and full.block.fixed < 100 < half.block.fixed
    assert (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")) == before


def test_a_compiled_block_keeps_no_more_than_its_share():
    """The partitioner is that of inductor; its choice depends on the proportions of the network, so they are SiT's."""
    network, images = SiTConfig(input_size=8, hidden_size=384, num_heads=6, depth=1, encoder_depth=1), 64
    block = SiT(network).blocks[0]
    block.compile(backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    x, c = torch.randn(images, 17, 384), torch.randn(images, 384)
    with torch.autocast("cpu", torch.bfloat16), kept_tensors(block) as kept:
        block(x.requires_grad_(), c.requires_grad_())
    compiled = sum(storage.nbytes() for storage in kept.values())
    found = count_activations(network, "bf16", device_type="cpu")
    assert compiled <= found.compiled("bf16").block.of(images) < found.block.of(images) <= 1.5 * compiled


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_a_gpu_takes_what_is_counted(checkpointing):
    network, images = SiTConfig(hidden_size=768, num_heads=12, depth=6, encoder_depth=4), 32
    model = SiT(network).cuda()
    model.activation_checkpointing = checkpointing
    found = count_activations(network, "bf16")
    kept_bytes(model, "bf16", "cuda", 2)[1].backward()  # gradients and workspaces
    before = torch.cuda.memory_allocated()
    kept, loss = kept_bytes(model, "bf16", "cuda", images)
    if not checkpointing:
        assert kept == pytest.approx(without_temporaries(found, images), rel=1e-4)
        assert torch.cuda.memory_allocated() - before == pytest.approx(kept, rel=0.02)
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert 0.6 * found.peak(images, checkpointing) < peak <= 1.02 * found.peak(images, checkpointing)
