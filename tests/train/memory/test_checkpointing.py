"""Levels of checkpointing: the same numbers, and no more computed again than each level says."""

from collections import Counter
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import ConfigError
from tests.train.memory.steps import batches_and_guard
from train import loop
from train.assembly import assemble
from train.checkpointing import ATTENTION
from train.config import Checkpointing, TrainConfig


class Calls(TorchDispatchMode):
    """Counts attention, and products with a bias by the length of their sums and their width."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTENTION:
            self.found["attention"] += 1
        if func is torch.ops.aten.addmm.default:
            self.found[tuple(args[2].shape)] += 1
        return func(*args, **(kwargs or {}))


def steps(config: TrainConfig) -> tuple[list[torch.Tensor], Counter[Any]]:
    """Return the gradients and weights of two steps, and the calls of the second one."""
    run = assemble(config)
    batches, guard = batches_and_guard(run)
    gradients: list[torch.Tensor] = []
    for parameter in run.controlnet.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda one: gradients.append(one.grad.clone())
            )
    loop.take_step(run, batches, guard, 1)
    with (calls := Calls()):
        loop.take_step(run, batches, guard, 2)
    batches.close()
    return [*gradients, *run.controlnet.parameters()], calls.found


def test_every_level_gives_the_same_bits_and_computes_what_it_says(config: TrainConfig) -> None:
    """The base has 6 blocks of width 128, the ControlNet 3."""
    config = replace(config, learning_rate=1e-2)
    results = {
        level: steps(replace(config, checkpointing=level)) for level in get_args(Checkpointing)
    }
    exact, _ = results["none"]
    for numbers, _ in results.values():
        assert len(numbers) == len(exact) > 100
        assert all(map(torch.equal, numbers, exact))
    calls = {level: found for level, (_, found) in results.items()}
    # No gradient reaches the base's first block.
    attention = {level: found["attention"] for level, found in calls.items()}
    assert attention == {"none": 9, "controlnet": 9 + 3, "selective": 9, "full": 9 + 3 + 5}
    # The feed-forward's second product, of picture and text; the base's last block has no text.
    second = {level: found[512, 128] for level, found in calls.items()}
    assert second["none"] == second["selective"] == 6 + 5 + 3 + 3
    assert second["none"] < second["controlnet"] < second["full"]
    # Its first product is computed again for both networks: by `selective` as often as by `full`.
    first = {level: found[128, 512] for level, found in calls.items()}
    assert first["none"] < first["controlnet"] < first["selective"] == first["full"]


def test_what_is_compiled_is_not_stored_in_part(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"--checkpointing selective: .*take --checkpointing"):
        replace(config, checkpointing="selective", compile=True)
