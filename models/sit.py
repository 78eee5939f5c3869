"""The network: SiT (arXiv 2401.08740), a diffusion transformer (DiT, arXiv 2212.09748, section 3) that denoises the
latents of an image. REG (arXiv 2507.01467, section 3) adds one class token to the sequence, which is denoised together
with the latents. REPA (arXiv 2410.06940, section 3) adds projectors, whose outputs are aligned with a frozen encoder.

`SiTConfig` selects the method: REG has the class slot and projectors, REPA has projectors only, SiT has neither. The
switches of SR-DiT (arXiv 2512.12386) are RMSNorm, norms of queries and keys, rotary positions (models/rope.py), value
residual, and token routing (models/sprint.py). The class token may lead the latents (models/cls_lead.py).

The names and the order of the parameters are the format of the published checkpoints. Do not change them.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.class_scale import ClassTokenScale
from models.embedders import LabelEmbedder, PatchEmbed, TimestepEmbedder
from models.norms import head_norm, token_norm
from models.projectors import ConvProjector, make_projectors
from models.rope import RotaryPositions, Rotation, rotate
from models.sit_config import PATCH_SIZES, PRESETS, SiTConfig, default_encoder_depth
from models.sprint import Tokens, choose_tokens, fill_in, take_tokens


class SiTOutput(NamedTuple):
    """What the network returns. `projected` is None if it is not requested, `cls_velocity` without a class slot."""

    velocity: Tensor  # (N, C, H, W)
    # One (N, 1 + T, z_dim) for each encoder at the first encoder depth, then those at the next depth; without a class
    # slot (N, T, z_dim).
    projected: list[Tensor] | None
    cls_velocity: Tensor | None  # (N, cls_token_dim)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (1 + scale) + shift, (N, T, D), for tokens x (N, T, D); shift and scale (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, optionally with norms and rotary positions of queries and keys.

    With value residual (arXiv 2410.17897) all blocks but the first one mix the first block's values into theirs.
    """

    def __init__(self, config: SiTConfig, fused_attn: bool, is_first: bool):
        super().__init__()
        hidden_size = config.hidden_size
        self.num_heads, self.fused_attn = config.num_heads, fused_attn
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)
        self.proj = nn.Linear(hidden_size, hidden_size)
        mixes = config.value_residual and not is_first
        # A number of shape (1,), because FSDP does not shard tensors without a dimension.
        self.v1_lambda = nn.Parameter(torch.full((1,), 0.5)) if mixes else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        if (number := state_dict.get(f"{prefix}v1_lambda")) is not None:
            state_dict[f"{prefix}v1_lambda"] = number.reshape(-1)  # other code may save it without a dimension
        super()._load_from_state_dict(state_dict, prefix, *more)

    def forward(self, x: Tensor, rotation: Rotation | None, first_v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the tokens (N, T, D) and this block's own values (N, heads, T, D / heads)."""
        n, tokens, width = x.shape
        qkv = self.qkv(x).view(n, tokens, 3, self.num_heads, width // self.num_heads)  # (N, T, 3, heads, D / heads)
        q, k, own_v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (N, heads, T, D / heads)
        q, k, v = self.q_norm(q), self.k_norm(k), own_v
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if self.v1_lambda is not None:
            v = self.v1_lambda * first_v + (1 - self.v1_lambda) * v
        q, k, v = q.to(own_v.dtype), k.to(own_v.dtype), v.to(own_v.dtype)  # norms and rotations may return float32
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, D / heads)
        else:
            weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (N, heads, T, T)
            x = weights.softmax(dim=-1).to(v.dtype) @ v  # (N, heads, T, D / heads)
        return self.proj(x.transpose(1, 2).reshape(n, tokens, width)), own_v


class Mlp(nn.Module):
    """The MLP of a block: (N, T, D) to (N, T, D)."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning (DiT, section 3.2)."""

    def __init__(self, config: SiTConfig, fused_attn: bool, is_first: bool):
        super().__init__()
        hidden_size = config.hidden_size
        self.returns_values = config.value_residual and is_first
        self.norm1 = token_norm(config)
        self.attn = Attention(config, fused_attn, is_first)
        self.norm2 = token_norm(config)
        self.mlp = Mlp(hidden_size, int(hidden_size * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self, x: Tensor, c: Tensor, rotation: Rotation | None = None, first_v: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return tokens (N, T, D) of tokens x (N, T, D) and conditioning c (N, D).

        `rotation` is given with rotary positions; `first_v`, what the first block returned, with value residual. The
        first block then returns its values (N, heads, T, D / heads) as well.
        """
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=-1)
        attended, values = self.attn(modulate(self.norm1(x), shift_attn, scale_attn), rotation, first_v)
        x = x + gate_attn.unsqueeze(1) * attended  # (N, T, D)
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # (N, T, D)
        return (x, values) if self.returns_values else x


class FinalLayer(nn.Module):
    """Maps patch tokens to velocities by `linear`, and the class token, the first one, by `linear_cls`."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        hidden_size = config.hidden_size
        self.norm_final = token_norm(config)
        self.linear = nn.Linear(hidden_size, config.patch_size**2 * config.in_channels)
        if config.cls_token_dim:
            self.linear_cls = nn.Linear(hidden_size, config.cls_token_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, has_cls: bool) -> tuple[Tensor, Tensor | None]:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)  # each (N, D)
        x = modulate(self.norm_final(x), shift, scale)  # (N, 1 + T, D), or (N, T, D) without a class slot
        if has_cls:
            return self.linear(x[:, 1:]), self.linear_cls(x[:, 0])  # (N, T, p p C), (N, cls_token_dim)
        return self.linear(x), None


class SiT(nn.Module):
    """Scalable interpolant transformer with an optional class slot.

    Args:
        config: description of the network.
        fused_attn: whether attention uses scaled_dot_product_attention. It does not change the weights.
        fields: fields of `SiTConfig`, in place of `config` or to replace fields of it.

    Attributes:
        activation_checkpointing: False at first. If True, only the inputs of the blocks are kept for the backward pass,
            which computes the rest again: less memory, more time, the same gradients.
    """

    def __init__(self, config: SiTConfig | None = None, fused_attn: bool = True, **fields: Any):
        super().__init__()
        seed = int(torch.randint(2**62, (), device="cpu"))  # drawn before PyTorch's own initialization draws numbers
        self.config = config = SiTConfig(**fields) if config is None else dataclasses.replace(config, **fields)
        self.input_size, self.patch_size, self.in_channels = config.input_size, config.patch_size, config.in_channels
        self.num_classes = self.null_class = config.num_classes  # the null class stands for "no class"
        self.encoder_depth, self.cls_token_dim = config.encoder_depth, config.cls_token_dim
        self.grid_size = config.grid_size
        self.activation_checkpointing = False

        # The registration order is part of the checkpoint format: the optimizer's state is stored by index.
        width = config.hidden_size
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, width), requires_grad=False)
        self.x_embedder = PatchEmbed(self.patch_size, self.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(self.num_classes, width)
        self.blocks = nn.ModuleList(SiTBlock(config, fused_attn, number == 0) for number in range(config.depth))
        self.projectors = make_projectors(config)
        self.final_layer = FinalLayer(config)
        if self.cls_token_dim:
            self.cls_projectors2 = nn.Linear(self.cls_token_dim, width)  # embeds the noisy class token
            self.wg_norm = token_norm(config, affine=True)  # normalizes the embedded class token
        self.slot_token = nn.Parameter(torch.zeros(1, 1, width)) if config.learnable_token else None
        self.feat_rope = RotaryPositions(self.grid_size, config.head_size) if config.rope else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if config.sprint else None
        self.fusion_proj = nn.Linear(2 * width, width) if config.sprint else None
        self.cls_scale = ClassTokenScale(self.cls_token_dim) if config.standardized_cls else None
        self.t_cls_embedder = TimestepEmbedder(width) if config.cls_lead else None
        self.initialize_weights(seed)

    # Dtype and device of the parameters; diffusers' pipelines read these attributes.
    dtype = property(lambda self: self.pos_embed.dtype)
    device = property(lambda self: self.pos_embed.device)

    def initialize_weights(self, seed: int) -> None:
        """Initialise as DiT (section 3.2) does: a new network returns exactly zero.

        Each weight has its own random stream, made from `seed` and the weight's name. Networks with the same seed
        therefore have equal weights in all parts that they share, with or without the class slot and the projectors.
        """
        if self.pos_embed.is_meta:
            return

        def stream(name: str) -> torch.Generator:
            return torch.Generator(self.pos_embed.device).manual_seed(seed + zlib.crc32(name.encode()))

        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=stream(name))
                nn.init.zeros_(module.bias)

        # Fixed positions of the patches. The class token, which is the first token, has the position zero.
        table = sincos_2d(self.pos_embed.shape[-1], self.grid_size)
        with torch.no_grad():
            self.pos_embed[0, -len(table) :].copy_(table)

        # The patch embedding is initialized as a linear layer.
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1), generator=stream("x_embedder"))
        nn.init.zeros_(patches.bias)

        # The convolutions of projectors.
        for number, projector in enumerate(self.projectors):
            if isinstance(projector, ConvProjector):
                projector.initialize(lambda name, prefix=f"projectors.{number}.": stream(prefix + name))

        # Embeddings of labels and times, and the learned token.
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02, generator=stream("y_embedder"))
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02, generator=stream("t_embedder.mlp.0"))
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02, generator=stream("t_embedder.mlp.2"))
        if self.t_cls_embedder is not None:  # 0 at the start: the network is that without a lead of the class token
            nn.init.normal_(self.t_cls_embedder.mlp[0].weight, std=0.02, generator=stream("t_cls_embedder.mlp.0"))
            nn.init.zeros_(self.t_cls_embedder.mlp[2].weight)
        if self.slot_token is not None:
            nn.init.normal_(self.slot_token, std=0.02, generator=stream("slot_token"))

        # adaLN-Zero: every block is the identity at the start, and every output is zero.
        for layer in [*self.blocks, self.final_layer]:
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.cls_token_dim:
            nn.init.zeros_(self.final_layer.linear_cls.weight)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Return latents (N, C, H, W) of patch tokens (N, T, p p C), whose last index is the channel."""
        n, p, g, c = x.shape[0], self.patch_size, self.grid_size, self.in_channels
        x = x.view(n, g, g, p, p, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(n, c, g * p, g * p)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cls_token: Tensor | None = None,
        label_drop: Tensor | None = None,
        project: bool = True,
        route: Tensor | None = None,
        path_drop: Tensor | None = None,
        skip_middle: bool = False,
        t_cls: Tensor | None = None,
    ) -> SiTOutput:
        """Return the velocities of noisy latents and of the noisy class token, and the projected tokens.

        Args:
            x: noisy latents (N, C, H, W).
            t: times (N,) in [0, 1], or (1,) for the complete batch; of the latents only if the class token leads.
            y: labels (N,) int64, 0 .. num_classes (the last one is the null class).
            cls_token: noisy class token (N, cls_token_dim); required if the network has a class slot, else not allowed.
            label_drop: (N,) bool, the labels to replace by the null class; None keeps all labels.
            project: whether to compute the projected tokens. Only the alignment loss needs them.
            route: SPRINT: uniform random numbers (N, 1 + T); the tokens with the smallest ones go through the middle
                blocks. None: all tokens do.
            path_drop: SPRINT: (N,) bool, where the mask token replaces the output of the middle blocks; None: nowhere.
            skip_middle: SPRINT: whether the mask token replaces it everywhere; the middle blocks are not computed.
            t_cls: times of the class token, shape as t; required if it leads (models/cls_lead.py), else not allowed.

        Raises ValueError if a class token or its time is missing, or if the part of the network is missing that an
        argument is for.
        """
        self._check_arguments(cls_token, t_cls, route is not None or path_drop is not None or skip_middle)
        x = self.x_embedder(x)  # (N, T, D)
        if cls_token is not None:
            cls_token = self.wg_norm(self.cls_projectors2(cls_token))  # (N, D)
            x = torch.cat([cls_token.unsqueeze(1), x], dim=1)  # (N, 1 + T, D)
        elif self.slot_token is not None:
            x = torch.cat([self.slot_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)  # (N, 1 + T, D)
        x = x + self.pos_embed  # (N, 1 + T, D), or (N, T, D) without a class slot
        c = self.conditioning(t, t_cls, y, label_drop).to(x.dtype)  # (N, D)

        tokens = Tokens(x, None if self.feat_rope is None else self.feat_rope(x.shape[1]))
        kept = None if route is None else choose_tokens(route, self.config.kept_tokens)  # (N, K)
        routed = self.config.routed_blocks
        projected, projectors = [] if project else None, iter(self.projectors)
        for number, block in enumerate(self.blocks, start=1):
            if number == routed.start:  # with SPRINT: the next blocks see the tokens `kept`
                all_tokens, tokens = tokens, tokens if kept is None else take_tokens(tokens, kept)
            if number == routed.stop:  # the next blocks see all tokens again
                middle = None if skip_middle else tokens.x  # (N, K, D)
                tokens = all_tokens._replace(x=self.fuse(all_tokens.x, middle, kept, path_drop))
            if not (skip_middle and number in routed):
                tokens = self.through(block, tokens, c)
            if project and number in self.config.encoder_depths:
                here = islice(projectors, len(self.config.z_dims))  # one for each encoder
                projected += [projector(tokens.x) for projector in here]  # [(N, 1 + T, z_dim)]
        x = tokens.x  # (N, 1 + T, D)
        if self.slot_token is not None:
            x = x[:, 1:]  # (N, T, D): the learned token has no velocity
        patches, cls_velocity = self.final_layer(x, c, has_cls=cls_token is not None)  # (N, T, p p C), (N, cls_dim)
        return SiTOutput(self.unpatchify(patches), projected, cls_velocity)

    def _check_arguments(self, cls_token: Tensor | None, t_cls: Tensor | None, with_sprint: bool) -> None:
        if (cls_token is None) != (self.cls_token_dim is None):
            slot = f"has a class slot of width {self.cls_token_dim}" if self.cls_token_dim else "has no class slot"
            raise ValueError(f"this network {slot}, but cls_token is {'missing' if cls_token is None else 'given'}")
        if (t_cls is None) != (self.t_cls_embedder is None):
            lead, given = self.config.cls_lead, "missing" if t_cls is None else "given"
            raise ValueError(f"the class token of this network leads by {lead:g}, but its times t_cls are {given}")
        if with_sprint and not self.config.sprint:
            raise ValueError("this network has no SPRINT: route, path_drop and skip_middle are not allowed")

    def conditioning(self, t: Tensor, t_cls: Tensor | None, y: Tensor, label_drop: Tensor | None) -> Tensor:
        """Return the sum of the embeddings of times and labels, (N, D); the arguments are those of `forward`."""
        if label_drop is not None:
            y = torch.where(label_drop, self.null_class, y)  # (N,)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        return c if t_cls is None else c + self.t_cls_embedder(t_cls)

    def through(self, block: SiTBlock, tokens: Tokens, c: Tensor) -> Tokens:
        """Return the tokens after a block. The first block adds its values if the other blocks need them."""
        given = (tokens.x, c, tokens.rotation, tokens.first_v)
        if self.activation_checkpointing and torch.is_grad_enabled():
            # A block draws no random numbers, so the random state need not be kept.
            out = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            out = block(*given)
        return tokens._replace(x=out[0], first_v=out[1]) if block.returns_values else tokens._replace(x=out)

    def fuse(self, x: Tensor, middle: Tensor | None, kept: Tensor | None, path_drop: Tensor | None) -> Tensor:
        """Return the input (N, 1 + T, D) of the last blocks, from the output x of the first blocks; see `fill_in`."""
        mask = self.mask_token.to(x.dtype).expand_as(x)  # (N, 1 + T, D)
        middle = mask if middle is None else fill_in(middle, mask, kept, path_drop)  # (N, 1 + T, D)
        return self.fusion_proj(torch.cat([x, middle], dim=-1)).to(x.dtype)


def sincos_2d(width: int, grid_size: int) -> Tensor:
    """Return the fixed position table (grid_size^2, width), float32, tokens in row-major order.

    The first half of each row encodes the token's column, the second half its row. Each half is
    [sin(k w_j), cos(k w_j)] with w_j = 10000^(-j / (width / 4)) (MAE, arXiv 2111.06377, in DiT's order of the halves).
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # (grid, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    columns = line.repeat(grid_size, 1)  # (grid^2, width / 2)
    rows = line.repeat_interleave(grid_size, dim=0)  # (grid^2, width / 2)
    return torch.cat([columns, rows], dim=1).float()


def build_preset(size: str, patch_size: int, fused_attn: bool = True, **fields: Any) -> SiT:
    """Return the network of a preset; `fields` of `SiTConfig` replace those of the preset."""
    depth, width, heads = PRESETS[size]
    preset = {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": patch_size}
    preset["encoder_depth"] = default_encoder_depth(size, fields.get("sprint", False))
    return SiT(fused_attn=fused_attn, **preset | fields)


#: "SiT-XL/2" and so on: functions that build the network; their keyword arguments are those of `SiT`.
SiT_models: dict[str, Callable[..., SiT]] = {
    f"SiT-{size}/{patch}": partial(build_preset, size, patch) for size in PRESETS for patch in PATCH_SIZES
}
