"""Floating point operations: those that a training step needs, and those that a device reaches."""

import time
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from train.config import TrainConfig
from train.memory.simulation import Simulation, Sizes


def count_step_flops(config: TrainConfig, sizes: Sizes) -> int:
    """Return the floating point operations that a step needs, recomputation left out.

    Args:
        config: settings of training.
        sizes: sizes of the networks and of the batch's tensors.
    """
    plain = replace(config, checkpointing="none", quantize_base=None, compile=False)
    aten: Any = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    with FakeTensorMode():
        run = Simulation(plain, sizes)
        with counter:
            run.step()
    return int(counter.get_total_flops()) * config.gradient_accumulation_steps


def attention_flops(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """Return the operations of softmax(Q K) V: two matrix products; [B, heads, T, width]."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


def attention_backward_flops(_: torch.Size, *others: Any, **__: Any) -> int:
    """Return the operations of the gradients: two matrix products for each forward one."""
    return 2 * attention_flops(*others)


def measure_matrix_rate() -> float:
    """Return the rate of large 16 bit matrix products on this device, in operations a second."""
    on_gpu = torch.cuda.is_available()
    side, repeats = (8192, 20) if on_gpu else (1024, 5)
    matrix = torch.randn(side, side, device="cuda" if on_gpu else "cpu").to(torch.bfloat16)
    best = 0.0
    for _ in range(3):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            matrix @ matrix
        if on_gpu:
            torch.cuda.synchronize()
        best = max(best, repeats * 2 * side**3 / (time.perf_counter() - start))
    return best
