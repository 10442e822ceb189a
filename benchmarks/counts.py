"""What a training step executes, counted on tensors without numbers: ours, and the reference's."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils.operations import ConvertOutputsToFp32
from diffusers import AutoencoderKL, SD3ControlNetModel, SD3Transformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import attention_backward_flops, attention_flops, count_step_flops
from common.memory.meter import Meter
from common.memory.need import GB
from train.config import TrainConfig
from train.memory.simulation import Simulation, Sizes
from train.memory.stand_ins import build_network

aten: Any = torch.ops.aten
# Operators that move numbers or change their format, and compute nothing.
COPIES = {
    aten._to_copy,
    aten.clone,
    aten.copy_,
    aten.cat,
    aten.constant_pad_nd,
    aten.slice_backward,
}
# Operators that are no views and start nothing on a GPU either.
NO_KERNELS = {
    aten.empty,
    aten.empty_like,
    aten.new_empty,
    aten._unsafe_view,
    torch.ops.prim.device,
}


@dataclass(frozen=True)
class Counts:
    """What an optimiser step takes; of the optimiser's own update only casts of `--bf16-weights`.

    Attributes:
        flops: floating point operations that are executed, a sample.
        kept_bytes: of activations that wait for the backward pass of a batch.
        copied_bytes: read and written by casts and copies, a step.
        kernels: operators that start work on a GPU, a step.
    """

    flops: int
    kept_bytes: int
    copied_bytes: int
    kernels: int


def executed_backward_flops(*shapes: Any, **_: Any) -> int:
    """Return what attention's backward pass executes: five products, one of them once more."""
    return attention_backward_flops(*shapes) * 5 // 4


class Operators(TorchDispatchMode):
    """While entered, counts what operators execute; see `Counts`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.copied_bytes = self.kernels = 0
        attention = {
            aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: executed_backward_flops,
        }
        self._formulas = FlopCounterMode(display=False, custom_mapping=attention).flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operator and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operator = func.overloadpacket
        if operator in self._formulas:
            self.flops += self._formulas[operator](*args, **kwargs, out_val=result)
        if operator in COPIES:
            moved = (*tree_leaves(args), *tree_leaves(result))
            self.copied_bytes += sum(
                one.numel() * one.element_size() for one in moved if isinstance(one, Tensor)
            )
        self.kernels += not (func.is_view or operator in NO_KERNELS)
        return result


def needed_flops(config: TrainConfig, sizes: Sizes) -> int:
    """Return the floating point operations that a sample needs, recomputation left out."""
    one = replace(config, train_batch_size=1, gradient_accumulation_steps=1)
    return count_step_flops(one, sizes)


def count_step(config: TrainConfig, sizes: Sizes) -> tuple[dict[str, int], Counts]:
    """Return the most bytes of a step by part, as `simulate` does, and what the step executes."""
    operators = Operators()
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        run = Simulation(config, sizes)
        with operators:
            fullest = run.fullest_step()
    batches = config.gradient_accumulation_steps
    counts = Counts(
        flops=operators.flops // config.train_batch_size,
        kept_bytes=run.kept_bytes,
        copied_bytes=operators.copied_bytes * batches,
        kernels=operators.kernels * batches,
    )
    return fullest, counts


def count_reference_step(sizes: Sizes) -> Counts:
    """Return what a step of diffusers' train_controlnet_sd3.py executes for one sample.

    With `--gradient_checkpointing` and `--mixed_precision bf16`: the VAE encodes picture and
    conditioning image at each step, the ControlNet recomputes its activations, the transformer
    keeps its own.

    Args:
        sizes: of the run; with a VAE.
    """
    assert sizes.vae is not None
    height, width = (8 * side for side in sizes.latent)
    tokens, joint = sizes.clip[0] + sizes.t5[0], int(sizes.transformer["joint_attention_dim"])
    meter, operators = Meter(), Operators()
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        vae = build_network(AutoencoderKL, sizes.vae, torch.bfloat16)
        transformer = build_network(SD3Transformer2DModel, sizes.transformer, torch.bfloat16)
        controlnet = build_network(SD3ControlNetModel, sizes.controlnet, torch.float32)
        for frozen in (vae, transformer):
            frozen.requires_grad_(False)
        controlnet.train().enable_gradient_checkpointing()
        use_float32_norms(controlnet)
        autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
        controlnet.forward = ConvertOutputsToFp32(autocast(controlnet.forward))
        for network in (vae, transformer, controlnet):
            for tensor in (*network.parameters(), *network.buffers()):
                meter.count(tensor, "weights")
        inputs = {
            "pixels": torch.empty(1, 3, height, width),
            "control": torch.empty(1, 3, height, width),
            "prompt": torch.empty(1, tokens, joint),
            "pooled": torch.empty(1, int(sizes.transformer["pooled_projection_dim"])),
        }
        with operators, meter:
            loss = _reference_loss(vae, controlnet, transformer, **inputs)
            kept = meter.now["activations"]
            loss.backward()
    return Counts(operators.flops, kept, operators.copied_bytes, operators.kernels)


def use_float32_norms(network: nn.Module) -> None:
    """Compute layer norms in float32, as CUDA's autocast does and the CPU's does not."""

    def in_float32(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].float(),)

    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(in_float32)


def _reference_loss(
    vae: Any,
    controlnet: Any,
    transformer: Any,
    *,
    pixels: Tensor,
    control: Tensor,
    prompt: Tensor,
    pooled: Tensor,
) -> Tensor:
    """Return the loss of one batch, all of it computed from pictures and embedded prompts."""
    half = torch.bfloat16

    def encode(images: Tensor) -> Tensor:
        latent = vae.encode(images.to(half)).latent_dist.sample()
        scaled: Tensor = (latent - vae.config.shift_factor) * vae.config.scaling_factor
        return scaled.to(half)

    latent = encode(pixels)
    noise, sigma = torch.randn_like(latent), torch.rand(len(latent), 1, 1, 1).to(half)
    noisy = (1 - sigma) * latent + sigma * noise
    common = {
        "hidden_states": noisy,
        "timestep": 1000 * sigma.flatten(),
        "encoder_hidden_states": prompt.to(half),
        "pooled_projections": pooled.to(half),
        "return_dict": False,
    }
    residuals = controlnet(controlnet_cond=encode(control), **common)[0]
    residuals = [residual.to(half) for residual in residuals]
    velocity: Tensor = transformer(block_controlnet_hidden_states=residuals, **common)[0]
    error = (velocity * -sigma + noisy).float() - latent.float()
    return error.square().flatten(1).mean(1).mean()


def table(rows: list[dict[str, Any]]) -> str:
    """Return what levels, presets and the reference execute, in Markdown.

    Args:
        rows: figures of `benchmarks.train_step --predict`; those of the largest pictures are shown.
    """
    lines = [
        "| | samples a step | TFLOP a sample | over those needed | kept for the backward pass, GB "
        "| casts and copies, GB a step | kernels a step |",
        "|---" + "|---:" * 6 + "|",
    ]
    counted = [row for row in rows if "flops" in row]
    largest = max(row["px"] for row in counted)
    shown = ("plain, batch 1", "checkpointing ", "card of ", "train_controlnet_sd3.py")
    for row in counted:
        if row["px"] < largest or not row["name"].startswith(shown):
            continue
        lines.append(
            f"| {row['name']} | {row['samples']} | {row['flops'] / 1e12:.1f} "
            f"| {row['flops'] / row['needed_flops']:.2f} | {row['kept_bytes'] / GB:.1f} "
            f"| {row['copied_bytes'] / GB:.0f} | {row['kernels']:,} |"
        )
    return "\n".join(lines)
