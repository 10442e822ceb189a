"""The miniature's VAE: a stock AutoencoderKL that starts near linear, so that it learns in minutes.

From the usual start GroupNorm removes the absolute colour of flat pictures. Here three channels
carry red, green and blue from end to end. Two constant channels of opposite sign keep GroupNorm's
statistics nearly fixed, an offset keeps the last SiLU nearly linear, and all residual branches
start at zero. Training then has to learn the detail alone.

Axes: B pictures, 3 colours, H x W pixels, C latent channels (16), h x w latent grid.
"""

from functools import partial

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

COLORS = slice(0, 3)
CONSTANTS = slice(3, 5)
ANCHOR = 8.0  # value of the constant channels, plus and minus; colours are in -1 to 1
SILU_OFFSET = 3.0
LOG_VARIANCE = -6.0


def build_vae() -> AutoencoderKL:
    """Return the VAE before training: it reproduces the mean colour of each 8 x 8 patch."""
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
            _pass_colors_on(half.conv_in)
            for module in half.modules():
                if isinstance(module, ResnetBlock2D):
                    _start_as_shortcut(module)
            _invert_norm_and_silu(half.conv_norm_out, half.conv_out)
        for block in vae.encoder.down_blocks:
            for sampler in block.downsamplers or ():
                _pass_colors_on(sampler.conv)
                sampler.conv.weight[COLORS] = 0
                for color in range(3):  # the mean of 2 x 2 pixels
                    sampler.conv.weight[color, color, :2, :2] = 0.25
        for block in vae.decoder.up_blocks:
            for sampler in block.upsamplers or ():
                _pass_colors_on(sampler.conv)
        vae.encoder.conv_out.weight[16:] = 0
        vae.encoder.conv_out.bias[16:] = LOG_VARIANCE
    return vae


def _pass_colors_on(conv: nn.Conv2d) -> None:
    """Copy the three colours from input to output, and set the two constant channels."""
    assert conv.bias is not None
    middle = conv.kernel_size[0] // 2
    conv.weight[: CONSTANTS.stop] = 0
    conv.bias[: CONSTANTS.stop] = 0
    for color in range(3):
        conv.weight[color, color, middle, middle] = 1
    conv.bias[3], conv.bias[4] = ANCHOR, -ANCHOR


def _start_as_shortcut(block: ResnetBlock2D) -> None:
    """Set a residual block's branch to zero, and let its shortcut pass the colours on."""
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    if block.conv_shortcut is not None:
        _pass_colors_on(block.conv_shortcut)


def _invert_norm_and_silu(norm: nn.GroupNorm, conv: nn.Conv2d) -> None:
    """Undo the normalisation and the SiLU before `conv` for the three colours, to first order."""
    assert conv.bias is not None
    deviation = ANCHOR * (2 / norm.num_channels) ** 0.5
    norm.weight[:] = deviation
    norm.bias[:] = SILU_OFFSET
    offset = torch.tensor(SILU_OFFSET, requires_grad=True)
    with torch.enable_grad():
        value = nn.functional.silu(offset)
        slope = torch.autograd.grad(value, offset)[0]
    conv.weight[COLORS] = 0
    middle = conv.kernel_size[0] // 2
    for color in range(3):
        conv.weight[color, color, middle, middle] = 1 / slope
    conv.bias[COLORS] = -value / slope


def freeze_constant_channels(vae: AutoencoderKL) -> None:
    """Keep training from changing the constant channels, and layers from reading them.

    A weight that read them would act as a bias that learns eight times as fast, and the whole
    picture's brightness would swing with every step. Call it once, before training.
    """
    for half in (vae.encoder, vae.decoder):
        for name, conv in half.named_modules():
            if isinstance(conv, nn.Conv2d):
                reads = name != "conv_in"
                writes = not reads or name.endswith((".conv", "conv_shortcut", "conv2"))
                if reads:
                    with torch.no_grad():
                        conv.weight[:, CONSTANTS] = 0
                conv.weight.register_hook(partial(_zero_gradient, rows=writes, columns=reads))
                if writes and conv.bias is not None:
                    conv.bias.register_hook(partial(_zero_gradient, rows=True, columns=False))


def _zero_gradient(gradient: Tensor, *, rows: bool, columns: bool) -> Tensor:
    """Return a gradient without that of the constant channels, as outputs and as inputs."""
    gradient = gradient.clone()
    if rows:
        gradient[CONSTANTS] = 0
    if columns:
        gradient[:, CONSTANTS] = 0
    return gradient
