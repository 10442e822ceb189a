"""Weights and gradients that are sharded over the processes: whole again, clipped, sharded anew."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from train.processes.strategy import strategy


def clip_gradients(
    accelerator: Accelerator, controlnet: Any, optimizer: Any, max_norm: float
) -> Tensor:
    """Clip the norm of the next update's gradient over all processes; return what it was, [].

    A fused optimiser of torch's is told what to divide by, as torch's GradScaler tells it, and
    divides while it steps: nothing else goes through the gradients, and the host waits for
    nothing. For another optimiser the host reads the norm, as it reads whether it is finite.

    Args:
        accelerator: prepared the ControlNet. DeepSpeed clips by itself, and has taken the
            optimiser's step by now; here it only returns the norm.
        controlnet: as accelerate prepared it.
        optimizer: torch's own, or a compatible one.
        max_norm: largest norm; 0 does not clip.
    """
    if strategy(accelerator) == "deepspeed":
        norm = accelerator.clip_grad_norm_(controlnet.parameters(), max_norm or math.inf)
        if accelerator.optimizer_step_was_skipped:
            norm = math.inf  # what was returned is the norm of an earlier step
        return torch.as_tensor(norm, device=accelerator.device)
    accelerator.unscale_gradients()
    trained = [parameter for parameter in controlnet.parameters() if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in trained])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = norm.float()  # of --bf16-weights it has their precision
    if max_norm and optimizer.defaults.get("fused"):
        # torch's own formula, so that 1 divides where nothing is clipped.
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp_min(1)
    elif max_norm and norm > max_norm:
        clip_grads_with_norm_(trained, max_norm, norm)
    return norm


def full_state_dict(
    accelerator: Accelerator, controlnet: Any, instead: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return all weights of a network that accelerate prepared, in the precision of training.

    Every process must call this, but only the main process may use the result.

    Args:
        accelerator: prepared the network.
        controlnet: the network.
        instead: takes the place of some of its weights, by name, sharded as they are.
    """
    network, instead = accelerator.unwrap_model(controlnet), instead or {}
    if strategy(accelerator) == "copies":
        return {**network.state_dict(), **instead}
    gather = _gather_zero if strategy(accelerator) == "deepspeed" else _gather_fsdp
    weights = {}
    for name, shard in (*network.named_parameters(), *network.named_buffers()):
        tensor = gather(instead.get(name, shard))
        if accelerator.is_main_process:
            weights[name] = tensor.detach().cpu()
    return weights


def _gather_fsdp(shard: Tensor) -> Tensor:
    return shard.full_tensor() if isinstance(shard, DTensor) else shard


def _gather_zero(shard: Tensor) -> Tensor:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if not isinstance(shard, torch.nn.Parameter):
        return shard
    if shard.requires_grad:
        tensor: Tensor = safe_get_full_fp32_param(shard)
        return tensor
    with GatheredParameters(shard):
        return shard.to(torch.float32, copy=True)


def sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor sharded over the processes as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def reshard(network: torch.nn.Module) -> None:
    """Make FSDP drop the weights it gathered for a forward pass, so that it gathers them anew.

    It keeps some of them for a backward pass, and meanwhile the network's parameters are these
    copies instead of its own shards.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
