"""The miniature's VAE: a stock AutoencoderKL that starts near linear, so that it learns in minutes.

From the usual start GroupNorm washes the absolute colour out of flat pictures. Here three channels
carry red, green and blue from end to end, two constant channels of opposite sign keep GroupNorm's
statistics nearly fixed, an offset keeps the last SiLU nearly linear, and all residual branches
begin at zero. What is left to learn is the detail.

Axes: B pictures, 3 colours, H x W pixels, C latent channels (16), h x w latent grid.
"""

from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

COLORS = slice(0, 3)
CONSTANTS = slice(3, 5)
ANCHOR = 8.0  # of the constant channels 3 and 4, against colours in -1 to 1
SILU_OFFSET = 3.0
LOG_VARIANCE = -6.0


def build_vae() -> AutoencoderKL:
    """Return the VAE at its start: it reproduces the mean colour of each 8 x 8 patch."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        sample_size=128,
    )
    with torch.no_grad():
        for half in (vae.encoder, vae.decoder):
            _carry(half.conv_in)
            for module in half.modules():
                if hasattr(module, "conv_shortcut"):
                    nn.init.zeros_(module.conv2.weight)
                    nn.init.zeros_(module.conv2.bias)
                    if module.conv_shortcut is not None:
                        _carry(module.conv_shortcut)
        for block in vae.encoder.down_blocks:
            for sampler in block.downsamplers or ():
                _carry(sampler.conv)
                sampler.conv.weight[COLORS] = 0
                for colour in range(3):  # the mean of 2 x 2, which the stride makes a patch
                    sampler.conv.weight[colour, colour, :2, :2] = 0.25
        for block in vae.decoder.up_blocks:
            for sampler in block.upsamplers or ():
                _carry(sampler.conv)
        _straighten(vae.encoder.conv_norm_out, vae.encoder.conv_out)
        _straighten(vae.decoder.conv_norm_out, vae.decoder.conv_out)
        vae.encoder.conv_out.weight[16:] = 0
        vae.encoder.conv_out.bias[16:] = LOG_VARIANCE
    return vae


def _carry(conv: nn.Conv2d) -> None:
    """Pass the three colours on, and set the two constant channels."""
    assert conv.bias is not None
    middle = conv.kernel_size[0] // 2
    conv.weight[: CONSTANTS.stop] = 0
    conv.bias[: CONSTANTS.stop] = 0
    for colour in range(3):
        conv.weight[colour, colour, middle, middle] = 1
    conv.bias[3], conv.bias[4] = ANCHOR, -ANCHOR


def _straighten(norm: nn.GroupNorm, conv: nn.Conv2d) -> None:
    """Undo the normalisation and the SiLU for the three colours, to first order."""
    assert conv.bias is not None
    channels = norm.num_channels
    deviation = ANCHOR * (2 / channels) ** 0.5
    norm.weight[:] = deviation
    norm.bias[:] = SILU_OFFSET
    at = torch.tensor(SILU_OFFSET, requires_grad=True)
    with torch.enable_grad():
        value = nn.functional.silu(at)
        slope = torch.autograd.grad(value, at)[0]
    conv.weight[COLORS] = 0
    middle = conv.kernel_size[0] // 2
    for colour in range(3):
        conv.weight[colour, colour, middle, middle] = 1 / slope
    conv.bias[COLORS] = -value / slope


def freeze_constant_channels(vae: AutoencoderKL) -> None:
    """Have training leave the constant channels alone: nothing reads them and nothing moves them.

    A weight that read them would be a bias eight times as quick, and the whole picture's brightness
    would swing with every step. To be called once, before training.
    """
    for half in (vae.encoder, vae.decoder):
        for name, conv in half.named_modules():
            if isinstance(conv, nn.Conv2d):
                reads = name != "conv_in"
                writes = reads is False or name.endswith((".conv", "conv_shortcut", "conv2"))
                if reads:
                    with torch.no_grad():
                        conv.weight[:, CONSTANTS] = 0
                conv.weight.register_hook(partial(_mask, rows=writes, columns=reads))
                if writes and conv.bias is not None:
                    conv.bias.register_hook(partial(_mask, rows=True, columns=False))


def _mask(gradient: Tensor, *, rows: bool, columns: bool) -> Tensor:
    gradient = gradient.clone()
    if rows:
        gradient[CONSTANTS] = 0
    if columns:
        gradient[:, CONSTANTS] = 0
    return gradient
