"""Float32 weights cast at their use: the numbers of a network in 16 bit, and no other casts."""

import copy
from typing import Any

import pytest
import torch
from diffusers import SD3ControlNetModel
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from train.memory.cast_weights import cast_weights_at_use

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (5, 6)),
        (nn.Linear(6, 4, bias=False), (5, 6)),
        (nn.Conv2d(3, 4, kernel_size=2, stride=2), (2, 3, 4, 4)),
    ],
)
def test_layers_compute_what_they_would_with_16_bit_weights(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    rounded = copy.deepcopy(layer).to(BF16)
    cast_weights_at_use(layer)
    inputs = torch.randn(shape, dtype=BF16)
    outputs, expected = layer(inputs), rounded(inputs)
    assert torch.equal(outputs, expected)
    upstream = torch.randn_like(expected)
    outputs.backward(upstream)
    expected.backward(upstream)
    for parameter, other in zip(layer.parameters(), rounded.parameters(), strict=True):
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert other.grad is not None
        assert torch.equal(parameter.grad, other.grad.float())


def test_a_norm_returns_what_it_was_given() -> None:
    norm = RMSNorm(8, eps=1e-6)
    inputs = torch.randn(3, 8, dtype=BF16)
    expected = inputs.float() / inputs.float().square().mean(-1, keepdim=True).sqrt()
    cast_weights_at_use(norm)
    found = norm(inputs)
    assert found.dtype == BF16
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-6)


def test_layers_that_are_not_known_are_refused() -> None:
    with pytest.raises(AssertionError, match="Bilinear"):
        cast_weights_at_use(nn.Bilinear(2, 2, 2))


class Casts(TorchDispatchMode):
    """Counts the numbers that are cast."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy" and result.dtype != args[0].dtype:
            self.count += result.numel()
        return result


def test_a_controlnet_casts_its_weights_and_keeps_nothing_in_float32() -> None:
    controlnet = SD3ControlNetModel(
        sample_size=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=16,
        extra_conditioning_channels=0,
    )
    cast_weights_at_use(controlnet)
    config, side, tokens = controlnet.config, 16, 4
    inputs = {
        "hidden_states": torch.randn(2, config.in_channels, side, side, dtype=BF16),
        "controlnet_cond": torch.randn(2, config.in_channels, side, side, dtype=BF16),
        "encoder_hidden_states": torch.randn(2, tokens, config.joint_attention_dim, dtype=BF16),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, dtype=BF16),
        "timestep": torch.tensor([1.0, 999.0]),
    }
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with Casts() as casts, hooks:
        residuals = controlnet(**inputs, return_dict=False)[0]
    assert {residual.dtype for residual in residuals} == {BF16}
    num_weights = sum(parameter.numel() for parameter in controlnet.parameters())
    positions = 2 * (side // 2) ** 2 * controlnet.inner_dim  # added in float32
    frequencies = 2 * 256  # of the timesteps
    assert casts.count == num_weights + positions + frequencies
    # Statistics of layer norms, one a token, and of attention, one a token and head.
    most = 2 * ((side // 2) ** 2 + tokens) * config.num_attention_heads
    assert all(one.numel() <= most for one in kept if one.dtype == torch.float32)
