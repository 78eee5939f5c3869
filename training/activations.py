"""The memory that a training step keeps for its backward pass, counted before the step on tensors without data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from loss import Draws, REGLoss, Targets
from models.interpolant import Interpolant
from models.sit import SiT, SiTConfig

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# With --compile, inductor keeps fewer tensors of a block and computes the others again. The shares are counts with the
# partitioner that inductor uses (backend aot_eager_decomp_partition), equal for SiT-S/2, B/2 and XL/2 and rounded up.
COMPILED_SHARE = {"no": 0.86, "fp16": 0.76, "bf16": 0.76}
COUNTED = (2, 4)  # images, in pairs: with one image, tensors of all images and of one would not differ


class Bytes(NamedTuple):
    """A number of bytes that is linear in the number of images."""

    fixed: int  # weights in the precision of autocast
    per_image: int

    def of(self, images: int) -> int:
        """Return the bytes for a number of images."""
        return self.fixed + images * self.per_image


@dataclass(frozen=True)
class Activations:
    """What one forward pass of network and loss keeps for the backward pass, without the parameters."""

    depth: int  # number of blocks
    block: Bytes  # what a block keeps
    block_input: Bytes  # its input, which is all that it keeps with activation checkpointing
    rest: Bytes  # what the other layers and the loss keep

    def peak(self, images: int, checkpointing: bool) -> int:
        """Return an upper estimate of the bytes of a step with `images` images.

        To what the blocks keep, the bytes of one more block are added for the temporary tensors of the backward pass,
        or for the block that it computes again.
        """
        kept = self.block
        if checkpointing:  # the weights in the precision of autocast are kept until the forward pass ends
            kept = Bytes(self.block.fixed, self.block_input.per_image)
        return self.rest.of(images) + self.depth * kept.of(images) + self.block.of(images)

    def compiled(self, precision: str) -> Activations:
        """Return an upper estimate for the compiled step."""
        block = self.block._replace(per_image=round(COMPILED_SHARE[precision] * self.block.per_image))
        return replace(self, block=block)


def count_activations(
    network: SiTConfig,
    precision: str,
    fused_attn: bool = True,
    device_type: str = "cuda",
    loss_weights: dict[str, float] | None = None,
) -> Activations:
    """Return what the backward pass of a network and of the loss needs, exactly, if it is not compiled.

    The forward pass is run on fake tensors of a device type, which need not exist: they have shapes, dtypes and
    storages but no data, and autocast casts them as it does on that device. Networks of two depths and batches of two
    and four images are counted, and the count is linear in both. With SPRINT, `depth` and `block` are those of the
    routed blocks, and `rest` includes the others.

    Args:
        network: description of the network.
        precision: no, fp16 or bf16 autocast.
        fused_attn: whether the network uses fused attention.
        device_type: cuda or cpu.
        loss_weights: those of `REGLoss`; default: none.
    """
    how = (precision, fused_attn, device_type, loss_weights or {})
    least = network.least_depth
    shallow, deep = ([_count(network.with_depth(depth), n, *how) for n in COUNTED] for depth in (least, least + 1))
    one, two = (_linear([kept for kept, _ in counts]) for counts in (shallow, deep))
    block = Bytes(*(b - a for a, b in zip(one, two, strict=True)))
    counted = (
        len(network.with_depth(least).routed_blocks) or least
    )  # blocks of the shallow network that are not in `rest`
    rest = Bytes(*(a - counted * b for a, b in zip(one, block, strict=True)))
    return Activations(
        len(network.routed_blocks) or network.depth, block, _linear([block_input for _, block_input in deep]), rest
    )


def _linear(counts: list[int]) -> Bytes:
    """Return the bytes of any number of images from those of `COUNTED`."""
    (few, more), (fewer_images, more_images) = counts, COUNTED
    per_image = (more - few) // (more_images - fewer_images)
    return Bytes(few - fewer_images * per_image, per_image)


def _count(
    network: SiTConfig, images: int, precision: str, fused_attn: bool, device_type: str, loss_weights: dict[str, float]
) -> tuple[int, int]:
    """Return the bytes that a forward pass keeps, parameters not counted, and those of the input of one block."""
    with torch.device("meta"):
        model = SiT(network, fused_attn)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device_type):
        model = model.to_empty(device=device_type)
        block_input = []
        model.blocks[len(model.blocks) // 2].register_forward_pre_hook(lambda _, inputs: block_input.append(inputs[0]))
        batch = _batch(network, images)
        with _autocast(device_type, DTYPES.get(precision)), _FusedAttention(), kept_tensors(model) as kept:
            REGLoss(Interpolant("linear"), loss_weights, network.cls_lead)(model, *batch)["loss"].mean()
        return sum(storage.nbytes() for storage in kept.values()), block_input[0].untyped_storage().nbytes()


def _batch(network: SiTConfig, images: int) -> tuple[Tensor, Tensor, Targets, Draws]:
    """Return what the loss gets for a batch, with the shapes and dtypes of training."""
    latents = (images, network.in_channels, network.input_size, network.input_size)
    has_slot = bool(network.cls_token_dim or network.learnable_token)
    tokens = (network.input_size // network.patch_size) ** 2 + has_slot
    cls_token = torch.empty(images, network.cls_token_dim) if network.cls_token_dim else None
    targets = Targets(cls_token, [torch.empty(images, tokens, width) for width in network.z_dims])
    draws = Draws(
        torch.empty(images),
        torch.empty(latents),
        torch.empty(latents),
        torch.empty(images, dtype=torch.bool),
        cls_token,
        torch.empty(images, tokens) if network.sprint else None,
        torch.empty(images, dtype=torch.bool) if network.sprint else None,
    )
    return torch.empty(latents), torch.empty(images, dtype=torch.int64), targets, draws


@contextlib.contextmanager
def kept_tensors(model: torch.nn.Module) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Collect the storages, each once, that the operations inside the block keep for their backward pass.

    Those of parameters and buffers of `model` are not collected.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@contextlib.contextmanager
def _autocast(device_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Do what `torch.autocast` does, which refuses CUDA on machines without a GPU."""
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, dtype is not None)
    torch.set_autocast_dtype(device_type, dtype or before[1])
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])


class _FusedAttention(TorchFunctionMode):
    """Replaces fused attention, whose kernel depends on the GPU, by one that all machines know.

    All of its kernels keep queries, keys, values, outputs and the logarithm of each softmax's sum.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3], **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))
