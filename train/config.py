"""The settings of stage 2; names and defaults are those of diffusers' train_controlnet_sd3.py."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import ConfigError
from common.options import option
from shards.format.manifest import DEFAULT_CONDITIONING
from shards.remote.streaming import LOCAL_CACHE_GB

AT_PRECOMPUTE = "this is settled when the cache is made; give it to python -m precompute."
MOVED = {
    "--dataset-name": AT_PRECOMPUTE,
    "--dataset-config-name": AT_PRECOMPUTE,
    "--train-data-dir": "give the data to python -m precompute --source.",
    "--image-column": AT_PRECOMPUTE,
    "--conditioning-image-column": AT_PRECOMPUTE,
    "--caption-column": AT_PRECOMPUTE,
    "--max-train-samples": AT_PRECOMPUTE,
    "--resolution": AT_PRECOMPUTE,
    "--max-sequence-length": AT_PRECOMPUTE,
    "--dataset-preprocess-batch-size": "see python -m precompute --text-batch-size.",
    "--validation-prompt": AT_PRECOMPUTE,
    "--validation-image": AT_PRECOMPUTE,
    "--upcast-vae": "see python -m precompute --vae-dtype, float32 by default.",
    "--num-extra-conditioning-channels": "further channels, a mask's for instance, need data that "
    "neither the reference nor this cache has; leave it out.",
    "--set-grads-to-none": "gradients are always set to None; leave it out.",
}


@dataclass(frozen=True)
class TrainConfig:
    """Train a ControlNet from a cache that precompute made."""

    pretrained_model_name_or_path: str = option(
        help="Base model: a diffusers folder or a hub id; only transformer and scheduler are read, "
        "and the VAE's decoder for validation images."
    )
    cache: str = option(
        help="The cache: a folder, or the address of one, s3://, gs://, hf://, http:// or https://."
    )
    output_dir: Path = option(
        Path("controlnet-model"), help="Where checkpoints, logs and the ControlNet go."
    )
    local_cache_dir: Path | None = option(
        None, help="Where shards of a remote cache are kept; among the user's caches by default."
    )
    local_cache_gb: float = option(LOCAL_CACHE_GB, help="How much of it at a time, in 10^9 bytes.")
    conditioning_name: str = option(DEFAULT_CONDITIONING, help="Which control of the cache.")
    controlnet_model_name_or_path: str | None = option(
        None, help="ControlNet to go on from; a copy of the transformer's first blocks otherwise."
    )
    num_controlnet_layers: int | None = option(
        None, help="Blocks of a new ControlNet, up to half the base's; 12 if it has that many."
    )
    revision: str | None = option(None, help="Revision of the base model on the hub.")
    variant: str | None = option(None, help="Variant of the base model's weight files, e.g. fp16.")
    cache_dir: Path | None = option(None, help="Where downloaded models are kept.")
    seed: int = option(0, help="Of order, noise, timesteps and dropped prompts.")
    shuffle_window: int | None = option(
        None, help="Shards mixed at a time; all of them by default."
    )
    train_batch_size: int = option(4, help="Samples a step and process.")
    num_train_epochs: int = option(1, help="Times through the data, unless --max-train-steps.")
    max_train_steps: int | None = option(None, help="Optimiser steps in all.")
    gradient_accumulation_steps: int = option(1, help="Batches an optimiser step.")
    gradient_checkpointing: bool = option(
        False, help="Compute activations of both networks twice rather than keep them."
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, help="Number format of the frozen base and of the arithmetic; accelerate's if absent."
    )
    quantize_base: Literal["int8", "fp8", "nf4"] | None = option(
        None,
        help="Keep the frozen base in 8 or 4 bit (NF4), which needs the extra [bitsandbytes].",
    )
    fp8_matmul: bool = option(
        False,
        help="Matrix products of the frozen base in 8 bit too, with --quantize-base fp8; on Ada, "
        "Hopper and later, and best with --compile.",
    )
    bf16_weights: bool = option(
        False,
        help="Keep the ControlNet in bfloat16, rounded at random at each step: 2 bytes a weight "
        "and gradient instead of 4, and another arithmetic; on one GPU.",
    )
    offload_optimizer: bool = option(
        False, help="Keep AdamW's state in host memory, to the same bits."
    )
    offload_activations: bool = option(
        False, help="Keep what the backward pass needs in host memory, to the same bits."
    )
    fused_backward_pass: bool = option(
        False,
        help="Take AdamW's step within the backward pass and free each gradient at once; with "
        "--max-grad-norm 0, without accumulation, on one GPU.",
    )
    compile: bool = option(
        False, help="Compile the blocks of both networks; the first step takes a minute or more."
    )
    allow_tf32: bool = option(False, help="TensorFloat-32 matrix products, on Ampere and later.")
    estimate: bool = option(
        False,
        help="Only say how much device memory the run will take, and what would make it less.",
    )
    learning_rate: float = option(5e-6, help="Peak learning rate.")
    scale_lr: bool = option(
        False, help="Multiply it by batch size, accumulation steps and processes."
    )
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
    ] = option("constant", help="diffusers' learning rate schedules.")
    lr_warmup_steps: int = option(500, help="For the schedules that warm up.")
    lr_num_cycles: int = option(1, help="For cosine_with_restarts.")
    lr_power: float = option(1.0, help="For polynomial.")
    use_8bit_adam: bool = option(False, help="bitsandbytes' AdamW; needs the extra [bitsandbytes].")
    adam_beta1: float = option(0.9, help="AdamW's first moment.")
    adam_beta2: float = option(0.999, help="AdamW's second moment.")
    adam_weight_decay: float = option(1e-2, help="AdamW's weight decay.")
    adam_epsilon: float = option(1e-8, help="AdamW's epsilon.")
    max_grad_norm: float = option(1.0, help="Gradients are clipped to this norm; 0 not at all.")
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        help="What to do where a gradient is not finite: its step is left out either way, and the "
        "samples are named.",
    )
    ema_decay: float | None = option(
        None,
        help="Keep a moving average of the weights, e.g. 0.999; it is saved in controlnet_ema/.",
    )
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"] = option(
        "logit_normal", help="How timesteps are drawn and losses weighted."
    )
    logit_mean: float = option(0.0, help="For logit_normal.")
    logit_std: float = option(1.0, help="For logit_normal.")
    mode_scale: float = option(1.29, help="For mode.")
    precondition_outputs: int = option(
        1, help="1: the loss compares clean latents; 0: velocities, noise - latent."
    )
    proportion_empty_prompts: float = option(
        0.0, help="Fraction of prompts replaced by the empty one, drawn anew at each step."
    )
    dataloader_num_workers: int = option(
        0, help="Threads that read ahead; 0 reads between the steps."
    )
    checkpointing_steps: int = option(500, help="A checkpoint each so many steps.")
    checkpoints_total_limit: int | None = option(None, help="Older checkpoints are removed.")
    resume_from_checkpoint: str | None = option(
        None, help="A checkpoint's folder, or `latest`, which starts anew where there is none."
    )
    validation_steps: int = option(
        100,
        help="Draw the cache's validation pairs, and measure the loss on its held-out rows, each "
        "so many steps; 0 never.",
    )
    num_validation_images: int = option(4, help="Pictures a validation pair.")
    validation_inference_steps: int = option(20, help="Sampling steps a picture.")
    validation_decode: Literal["vae", "cpu", "latents"] = option(
        "vae",
        help="Decode validation pictures on the training device, on the CPU, or not at all: "
        "python -m infer decode does it elsewhere.",
    )
    validation_guidance_scale: float = option(7.0, help="Classifier-free guidance; 1 turns it off.")
    logging_steps: int = option(10, help="Log loss and learning rate each so many steps.")
    logging_dir: str = option("logs", help="Of the tracker, in the output folder.")
    report_to: Literal["tensorboard", "wandb", "none"] = option("tensorboard", help="Tracker.")
    tracker_project_name: str = option("train_controlnet", help="Name of the run's project.")
    push_to_hub: bool = option(False, help="Upload the ControlNet with its model card at the end.")
    hub_model_id: str | None = option(
        None, help="Repository to upload to; named like the output folder by default."
    )
    hub_token: str | None = option(
        None, secret=True, help="Of the hub; hf auth login keeps it out of command lines."
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is loaded.

        Raises:
            ConfigError: naming the option.
        """
        at_least_one = (
            "train_batch_size",
            "num_train_epochs",
            "max_train_steps",
            "gradient_accumulation_steps",
            "num_controlnet_layers",
            "shuffle_window",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "num_validation_images",
            "validation_inference_steps",
            "logging_steps",
        )
        not_negative = ("seed", "validation_steps", "dataloader_num_workers", "lr_warmup_steps")
        for names, least in ((at_least_one, 1), (not_negative, 0)):
            for name in names:
                value = getattr(self, name)
                if value is not None and value < least:
                    flag = "--" + name.replace("_", "-")
                    raise ConfigError(f"{flag} {value}: must be at least {least}.")
        if not 0 < self.local_cache_gb < math.inf:
            raise ConfigError(f"--local-cache-gb {self.local_cache_gb:g}: must be above 0.")
        if not 0 <= self.max_grad_norm < math.inf:
            raise ConfigError(f"--max-grad-norm {self.max_grad_norm:g}: must be at least 0.")
        if self.fp8_matmul and self.quantize_base != "fp8":
            raise ConfigError("--fp8-matmul: goes with --quantize-base fp8.")
        if self.precondition_outputs not in (0, 1):
            raise ConfigError(
                f"--precondition-outputs {self.precondition_outputs}: must be 0 or 1."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"--ema-decay {self.ema_decay}: must be between 0 and 1, e.g. 0.999.")
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise ConfigError(
                f"--proportion-empty-prompts {self.proportion_empty_prompts}: must be in 0 to 1."
            )
