"""The network of a training run, its average and its optimiser: fresh, from given weights, or from a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from common.io import InputError
from models import ema
from models.checkpoint import load_checkpoint, network_weights
from models.sit import SiT, SiT_models
from training.parallelism import device_mesh, shard, shard_like


def build_network(args: argparse.Namespace) -> SiT:
    """Return a fresh network of the described settings."""
    torch.manual_seed(args.seed)
    try:
        return SiT_models[args.model](
            input_size=args.latent_size,
            in_channels=args.in_channels,
            depth=args.depth,
            hidden_size=args.hidden_size,
            num_heads=args.num_heads,
            num_classes=args.num_classes,
            encoder_depth=args.encoder_depth,
            z_dims=args.z_dims,
            projector_dim=args.projector_dim,
            cls_token_dim=args.cls_token_dim,
            qk_norm=args.qk_norm,
            fused_attn=args.fused_attn,
            learnable_token=args.entangle == "learnable",
        )
    except ValueError as error:
        raise InputError(f"--model {args.model} with the given sizes: {error}") from error


def prepare_networks(
    args: argparse.Namespace, accelerator: Accelerator, checkpoint: dict[str, Any] | None
) -> tuple[torch.nn.Module, SiT, AcceleratedOptimizer]:
    """Return the network, its average and the optimiser as the processes use them, fresh or from a checkpoint."""
    model = build_network(args)
    average = ema.averaged_copy(model)
    model.activation_checkpointing = args.activation_checkpointing
    if checkpoint is not None:
        restore_weights(checkpoint, model, average)
    elif args.init_from:
        fresh = start_from(args.init_from, model, average)
        accelerator.print(f"weights of {args.init_from}; fresh: {', '.join(fresh) or 'nothing'}")
    if args.fsdp:
        mesh = device_mesh(accelerator)
        shard(model, mesh)
        shard(average, mesh)
    else:
        model, average = model.to(accelerator.device), average.to(accelerator.device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True,  # the one kind that leaves out a step on the device's own word
    )
    if checkpoint is not None:
        restore_optimizer(checkpoint, optimizer, model)
    if not args.fsdp:
        model = accelerator.prepare(model)
    optimizer = accelerator.prepare(optimizer)
    if checkpoint is not None and accelerator.scaler is not None and checkpoint.get("scaler"):
        accelerator.scaler.load_state_dict(checkpoint["scaler"])
    return model, average, optimizer


def restore_weights(checkpoint: dict[str, Any], model: SiT, average: SiT) -> None:
    """Load weights and averaged weights, strictly."""
    try:
        model.load_state_dict(network_weights(checkpoint, "model"))
        average.load_state_dict(network_weights(checkpoint, "ema"))
    except RuntimeError as error:
        raise InputError(f"the checkpoint does not fit the network of the flags: {error}") from error


def restore_optimizer(checkpoint: dict[str, Any], optimizer: torch.optim.Optimizer, model: SiT) -> None:
    """Load the optimiser's state, strictly."""
    # Published checkpoints, and older ones of ours, come from another implementation of the same AdamW.
    groups = [{**group, "fused": True, "foreach": None} for group in checkpoint["opt"]["param_groups"]]
    try:
        state = shard_like(place_moments(checkpoint, model), model)
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        for state in optimizer.state.values():  # its own memory: the file is mapped, and may be cleared away soon
            state.update({name: value.clone() for name, value in state.items() if value.device.type == "cpu"})
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"the checkpoint's optimiser does not fit the network of the flags: {error}") from error


def place_moments(checkpoint: dict[str, Any], model: SiT) -> dict[int, dict[str, Tensor]]:
    """Return AdamW's state, which a checkpoint has by a parameter's index, under the indices of `model`.

    The older REPA layout may count in an order of its own, that of its weights: taken where ours does not fit. Nothing
    else compares shapes before the first step reads one parameter's moments as another's.
    """
    state, parameters = checkpoint["opt"]["state"], dict(model.named_parameters())
    names, shapes = list(parameters), [parameter.shape for parameter in parameters.values()]
    ours, theirs = names, [name for name in network_weights(checkpoint, "model") if name in parameters]
    for order in (ours, theirs):
        placed = {names.index(order[index]): moments for index, moments in state.items()}
        if all(moments["exp_avg"].shape == shapes[index] for index, moments in placed.items()):
            return placed
    raise ValueError("its moments have other shapes than the parameters")


def start_from(path: str | Path, model: SiT, average: SiT) -> list[str]:
    """Give a new run the averaged weights of a checkpoint; return the names of what they do not fit and stays fresh.

    Blocks and embeddings of latents and time have to fit; labels, projectors and class slot may be others, and so may
    the resolution, whose position table is computed.

    Raises:
        InputError: the weights are those of another network, or not to be read.
    """
    given, own = network_weights(load_checkpoint(path), "ema", path), model.state_dict()
    wanted = [name for name in own if name != "pos_embed"]
    fresh = [name for name in wanted if name not in given or given[name].shape != own[name].shape]
    alien = [name for name in given if name not in own] + fresh
    if strange := [name for name in alien if name.startswith(("blocks.", "x_embedder.", "t_embedder."))]:
        raise InputError(f"--init-from {path}: holds another network than that of the flags; {strange[0]} differs")
    own.update({name: given[name] for name in wanted if name not in fresh})
    model.load_state_dict(own)
    average.load_state_dict(own)
    return fresh
