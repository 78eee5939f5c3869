"""The network: SiT (arXiv 2401.08740), a diffusion transformer (DiT, arXiv 2212.09748, section 3) that denoises the
latents of an image and, in REG (arXiv 2507.01467, section 3), one class token beside them; with the projectors that
REPA (arXiv 2410.06940, section 3) aligns to a frozen encoder.

One class is all three: without the class slot it is REPA, without projectors too it is SiT.

Names and order of the parameters are those of the published checkpoints, ugly or not: they are the file format.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TIME_FREQUENCIES = 256  # width of the sinusoidal features of t (DiT)
NORM_EPS = 1e-6
PRESETS = {  # depth, width, heads (DiT, table 1)
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCH_SIZES = (2, 4, 8)
# The block after which the projectors read, counted from 1 (REPA, section 4; REG, table 5 for B).
ENCODER_DEPTHS = {"S": 4, "B": 4, "L": 8, "XL": 8}


class SiTOutput(NamedTuple):
    """What the network returns. `projected` is None where it was not asked for, `cls_velocity` without a class slot."""

    velocity: Tensor  # (N, C, H, W)
    projected: list[Tensor] | None  # one (N, 1 + T, width) for each encoder; without a class slot (N, T, width)
    cls_velocity: Tensor | None  # (N, cls_token_dim)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (1 + scale) + shift, with shift and scale (N, D) for all tokens of x (N, T, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbed(nn.Module):
    """Latents (N, C, H, W) to one token for each patch (N, T, D), row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Times (N,) in [0, 1] to vectors (N, D)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    @staticmethod
    def features(t: Tensor) -> Tensor:
        """Return [cos, sin] of t at geometric frequencies, (N, 256) float32. t itself, not t times 1000."""
        half = TIME_FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t.float()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.features(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels (N,) to vectors (N, D). Index num_classes is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, optionally with LayerNorm on queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool, fused_attn: bool):
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = fused_attn
        head_size = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(head_size) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_size) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).view(n, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (N, heads, T, D / heads)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # autocast normalises in float32
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            x = weights.softmax(dim=-1).to(v.dtype) @ v
        return self.proj(x.transpose(1, 2).reshape(n, tokens, width))


class Mlp(nn.Module):
    """The block's feed-forward part."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _norm(hidden_size: int) -> nn.LayerNorm:
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)


class SiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning (DiT, section 3.2)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool, fused_attn: bool):
        super().__init__()
        self.norm1 = _norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, qk_norm, fused_attn)
        self.norm2 = _norm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate_attn.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens to velocities: patches through `linear`, the class token, which stands first, through `linear_cls`."""

    def __init__(self, hidden_size: int, patch_values: int, cls_token_dim: int | None):
        super().__init__()
        self.norm_final = _norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_values)
        if cls_token_dim:
            self.linear_cls = nn.Linear(hidden_size, cls_token_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, has_cls: bool) -> tuple[Tensor, Tensor | None]:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        x = modulate(self.norm_final(x), shift, scale)
        if has_cls:
            return self.linear(x[:, 1:]), self.linear_cls(x[:, 0])
        return self.linear(x), None


class Projector(nn.Sequential):
    """The three-layer MLP of REPA (arXiv 2410.06940, section 3), from the network's width to an encoder's."""

    def __init__(self, hidden_size: int, projector_dim: int, z_dim: int):
        super().__init__(
            nn.Linear(hidden_size, projector_dim),
            nn.SiLU(),
            nn.Linear(projector_dim, projector_dim),
            nn.SiLU(),
            nn.Linear(projector_dim, z_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (N, T, z_dim) of tokens (N, T, D)."""
        for layer in self:  # written out: older torch (2.6) leaves nn.Sequential's own forward uncompiled
            x = layer(x)
        return x


class SiT(nn.Module):
    """Scalable interpolant transformer with an optional class slot.

    Args:
        input_size: height and width of the latents; a multiple of patch_size.
        patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio: the usual.
        num_classes: classes without the null class, which gets index num_classes.
        class_dropout_prob: in training mode each label becomes null with this probability.
        encoder_depth: the projectors read after this block, counted from 1.
        z_dims: width of each encoder to be aligned with; empty for no projectors.
        projector_dim: inner width of the projectors.
        cls_token_dim: width of the class token (the first encoder's); None for no class slot.
        learnable_token: put a learnt token, the same for all images, into the slot instead: it takes part in attention
            and alignment, but is neither noised nor denoised (REG, the ablation of the entangled signal).
        qk_norm: LayerNorm on queries and keys.
        fused_attn: attention through scaled_dot_product_attention.

    Attributes:
        activation_checkpointing: off at first; set to True, the blocks keep their inputs alone for the backward pass,
            which computes the rest a second time. Less memory, more time, the same gradients.

    Raises:
        ValueError: sizes that do not go together.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        encoder_depth: int = 8,
        z_dims: Sequence[int] = (768,),
        projector_dim: int = 2048,
        cls_token_dim: int | None = 768,
        qk_norm: bool = False,
        fused_attn: bool = True,
        learnable_token: bool = False,
    ):
        super().__init__()
        seed = int(torch.randint(2**62, (), device="cpu"))  # before PyTorch's own initialisation draws, which varies
        if learnable_token and cls_token_dim:
            raise ValueError(f"cls_token_dim {cls_token_dim} and learnable_token: there is one slot for one of them")
        _check_sizes(input_size, patch_size, hidden_size, num_heads, depth, encoder_depth if z_dims else 1)
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.encoder_depth = encoder_depth
        self.cls_token_dim = cls_token_dim or None
        self.grid_size = input_size // patch_size
        self.activation_checkpointing = False

        # Registration order is part of the checkpoint format: the optimiser's state is kept by index.
        rows = self.grid_size**2 + (1 if self.cls_token_dim or learnable_token else 0)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, hidden_size), requires_grad=False)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.blocks = nn.ModuleList(
            SiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm, fused_attn) for _ in range(depth)
        )
        self.projectors = nn.ModuleList(Projector(hidden_size, projector_dim, z_dim) for z_dim in z_dims)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels, self.cls_token_dim)
        if self.cls_token_dim:
            self.cls_projectors2 = nn.Linear(self.cls_token_dim, hidden_size)  # embeds the noisy class token ...
            self.wg_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)  # ... and normalises it
        self.slot_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if learnable_token else None
        self.initialize_weights(seed)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.num_classes

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, by the name that diffusers' pipelines ask for."""
        return self.pos_embed.dtype

    def initialize_weights(self, seed: int) -> None:
        """Initialise as DiT (section 3.2) does: a fresh network returns exactly zero.

        Each weight has a random stream of its own, made of `seed` and its name. So networks of the same seed share what
        they have in common, whichever of slot and projectors they have: REG, REPA and SiT start alike.
        """
        if self.pos_embed.is_meta:
            return

        def stream(name: str) -> torch.Generator:
            return torch.Generator(self.pos_embed.device).manual_seed(seed + zlib.crc32(name.encode()))

        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=stream(name))
                nn.init.zeros_(module.bias)

        # Fixed positions; the class token, which stands first, has none.
        table = sincos_2d(self.pos_embed.shape[-1], self.grid_size)
        with torch.no_grad():
            self.pos_embed[0, -len(table) :].copy_(table)

        # The patch embedding is a linear layer in the shape of a convolution.
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1), generator=stream("x_embedder"))
        nn.init.zeros_(patches.bias)

        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02, generator=stream("y_embedder"))
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02, generator=stream("t_embedder.mlp.0"))
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02, generator=stream("t_embedder.mlp.2"))
        if self.slot_token is not None:
            nn.init.normal_(self.slot_token, std=0.02, generator=stream("slot_token"))

        # adaLN-Zero: every block begins as the identity, every output as zero.
        for layer in [*self.blocks, self.final_layer]:
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.cls_token_dim:
            nn.init.zeros_(self.final_layer.linear_cls.weight)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Return latents (N, C, H, W) of patch tokens (N, T, p p C), the channel last inside each token."""
        n, p, g, c = x.shape[0], self.patch_size, self.grid_size, self.in_channels
        x = x.view(n, g, g, p, p, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(n, c, g * p, g * p)

    def drop_labels(self, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """Return labels (N,) with the null class where `drop` (N,) bool says so.

        Without `drop`, labels are dropped at random in training mode and kept in eval mode.
        """
        if drop is None:
            if not (self.training and self.class_dropout_prob > 0):
                return y
            drop = torch.rand(y.shape, device=y.device) < self.class_dropout_prob
        return torch.where(drop, self.null_class, y)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cls_token: Tensor | None = None,
        label_drop: Tensor | None = None,
        project: bool = True,
    ) -> SiTOutput:
        """Return the velocities of noisy latents and of the noisy class token, and the projected tokens.

        Args:
            x: noisy latents (N, C, H, W).
            t: times (N,) in [0, 1], or (1,) for the whole batch.
            y: labels (N,) int64, 0 .. num_classes (the last is the null class).
            cls_token: noisy class token (N, cls_token_dim); needed if and only if the network has a class slot.
            label_drop: (N,) bool, which labels to replace by the null class; None: see `drop_labels`.
            project: whether to compute the projected tokens. They serve the alignment loss only, so sampling
                switches them off.

        Raises:
            ValueError: a class token is missing, or given to a network without a class slot.
        """
        if (cls_token is None) != (self.cls_token_dim is None):
            slot = f"has a class slot of width {self.cls_token_dim}" if self.cls_token_dim else "has no class slot"
            raise ValueError(f"this network {slot}, but cls_token is {'missing' if cls_token is None else 'given'}")
        x = self.x_embedder(x)  # (N, T, D)
        if cls_token is not None:
            x = torch.cat([self.wg_norm(self.cls_projectors2(cls_token)).unsqueeze(1), x], dim=1)
        elif self.slot_token is not None:
            x = torch.cat([self.slot_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        x = x + self.pos_embed  # (N, 1 + T, D)
        c = (self.t_embedder(t) + self.y_embedder(self.drop_labels(y, label_drop))).to(x.dtype)  # (N, D)

        projected = None
        for number, block in enumerate(self.blocks, start=1):
            x = self._run_block(block, x, c)  # (N, 1 + T, D)
            if project and number == self.encoder_depth:
                projected = [projector(x) for projector in self.projectors]  # [(N, 1 + T, z_dim)]
        if self.slot_token is not None:
            x = x[:, 1:]  # it has served the other tokens, and has no velocity of its own
        patches, cls_velocity = self.final_layer(x, c, has_cls=cls_token is not None)  # (N, T, p p C), (N, cls_dim)
        return SiTOutput(self.unpatchify(patches), projected, cls_velocity)

    def _run_block(self, block: SiTBlock, x: Tensor, c: Tensor) -> Tensor:
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return block(x, c)
        # Nothing in a block is random, so there is no random state to keep.
        return checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False)


def _check_sizes(
    input_size: int, patch_size: int, hidden_size: int, num_heads: int, depth: int, encoder_depth: int
) -> None:
    if input_size < patch_size or input_size % patch_size:
        raise ValueError(f"latents of {input_size} x {input_size} do not divide into patches of {patch_size}")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} does not divide by num_heads {num_heads}")
    if hidden_size % 4:
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of 4, which the position table needs")
    if not 1 <= encoder_depth <= depth:
        raise ValueError(f"encoder_depth {encoder_depth} is outside 1 .. {depth}, the number of blocks")


def sincos_2d(width: int, grid_size: int) -> Tensor:
    """Return the fixed position table (grid_size^2, width), float32, tokens in row-major order.

    The first half of each row comes from the column, the second from the row of the token; each half is
    [sin(k w_j), cos(k w_j)] with w_j = 10000^(-j / (width / 4)) (MAE, arXiv 2111.06377, in DiT's arrangement).
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    columns = line.repeat(grid_size, 1)
    rows = line.repeat_interleave(grid_size, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def _preset(size: str, patch_size: int) -> Callable[..., SiT]:
    depth, hidden_size, num_heads = PRESETS[size]
    return partial(
        SiT,
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        patch_size=patch_size,
        encoder_depth=ENCODER_DEPTHS[size],
    )


#: "SiT-XL/2" and so on: functions that build the network; their keyword arguments are SiT's.
SiT_models: dict[str, Callable[..., SiT]] = {
    f"SiT-{size}/{patch_size}": _preset(size, patch_size) for size in PRESETS for patch_size in PATCH_SIZES
}
