"""The settings of stage 2; names and defaults are those of diffusers' train_controlnet_sd3.py."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.checks import check_resolution, check_sequence_length
from common.errors import ConfigError
from common.options import flag, option
from sd3.controlnet.block_counts import in_words
from sd3.controlnet.kinds import ControlNetKind
from sd3.controlnet.pooled_projection import DEFAULT_POOLED_PROJECTION, PooledProjection
from sd3.controlnet.unsaved_convention import ConfigConvention
from shards.format.manifest import DEFAULT_CONDITIONING
from shards.remote.streaming import LOCAL_CACHE_GB
from train.misplaced_options import AT_PRECOMPUTE
from train.optim.arguments import parse_arguments
from train.optim.named import ADAMS, ADAMW, ADAMW_8BIT, NAMED, SCHEDULE_FREE, find_named, is_known

BY_RESOLUTION = "resolution"  # the value of --shift beside numbers
DEFAULT_SEQUENCE_LENGTH = 77  # T5 tokens; stage 1's default too
# What the networks get that can be dropped.
DROPPED = ("t5", "clip", "pooled", "control")
# What AdamW's options are called among the arguments of optimisers.
ADAM_OPTIONS = {
    "betas": ("adam_beta1", "adam_beta2"),
    "weight_decay": ("adam_weight_decay",),
    "eps": ("adam_epsilon",),
}
# Each takes less memory than the one before, and more time.
Checkpointing = Literal["none", "controlnet", "selective", "full"]

# accelerate.tracking.LOGGER_TYPE_TO_CLASS, which takes too long to import for --help.
Tracker = Literal[
    "tensorboard",
    "wandb",
    "aim",
    "clearml",
    "comet_ml",
    "dvclive",
    "mlflow",
    "swanlab",
    "trackio",
    "all",
    "none",
]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a ControlNet from a cache that precompute made."""

    cache: tuple[str, ...] = option(
        help="The cache: a folder, or its URL (s3://, gs://, hf://, http:// or https://); several "
        "are mixed. cache[:1000] is the first 1,000 of its samples.",
        heading="Data",
        aliases=("shards",),
        unless="estimate",
    )
    conditioning_name: tuple[str, ...] = option(
        (DEFAULT_CONDITIONING,),
        help="Which of the cache's controls to train on; of several caches one for all, or one "
        "for each.",
    )
    weights: tuple[float, ...] = option(
        (),
        help="How often each of several caches comes, beside the others: 3 1. By default each "
        "sample of all comes equally often.",
    )
    repeats: tuple[int, ...] = option(
        (), help="Instead: how often each cache's samples come in a pass over the data."
    )
    proportion_empty_prompts: float = option(
        0.0, help="Fraction of prompts replaced by the empty prompt, drawn at each step."
    )
    dropout_t5: float = option(
        0.0,
        help="Likewise of samples without T5's embedding, so that pictures can be drawn without T5 "
        "(infer --no-t5).",
    )
    dropout_clip: float = option(0.0, help="Likewise without CLIP's embedding.")
    dropout_pooled: float = option(0.0, help="Likewise without the pooled embedding.")
    dropout_control: float = option(0.0, help="Likewise without the control.")
    shuffle_window: int | None = option(
        None, help="Shards shuffled together; by default all of them."
    )
    dataloader_num_workers: int = option(
        0, help="Threads that read samples ahead; 0 reads between steps."
    )
    local_cache_dir: Path | None = option(
        None,
        help="Folder for downloaded shards of a remote cache; by default in the user's cache "
        "folder.",
    )
    local_cache_gb: float = option(
        LOCAL_CACHE_GB, help="Size of --local-cache-dir at most, in 10^9 bytes."
    )
    pretrained_model_name_or_path: str = option(
        help="Base model: a diffusers folder, a hub id or a .safetensors file; only transformer "
        "and scheduler are read, and the VAE's decoder for validation images.",
        heading="Base model",
    )
    revision: str | None = option(None, help="Revision of the base model on the hub.")
    variant: str | None = option(None, help="Variant of the base model's weight files, e.g. fp16.")
    single_file_config: str | None = option(
        None,
        help="Of a one-file base: folder or hub id of the configurations, tokenizers and whatever "
        "else it lacks; by default the published model of its kind.",
    )
    transformer: Path | None = option(
        None,
        help="A .safetensors file whose transformer takes the place of the base's, e.g. a "
        "fine-tune's.",
    )
    lora: tuple[str, ...] = option(
        (),
        help="LoRA to merge into the base: a .safetensors file, a folder or a hub id; repeatable. "
        "Needs the extra [lora].",
    )
    lora_scale: tuple[float, ...] = option(
        (1.0,), help="Strength of the LoRAs: one for all, or one for each."
    )
    cache_dir: Path | None = option(
        None, help="Folder for downloaded models; not the cache of shards."
    )
    controlnet_model_name_or_path: str | None = option(
        None,
        help="ControlNet to start from; by default a copy of the transformer's first blocks.",
        heading="ControlNet",
    )
    num_controlnet_layers: int | None = option(
        None,
        help="Blocks of a new ControlNet, at most half the base's; by default 12, or as many as "
        "fit. Where they divide the base's, ComfyUI draws what diffusers draws: of 24 blocks "
        f"{in_words(24)}, of 38 (SD3.5 large) {in_words(38)}.",
    )
    convention: ConfigConvention = option(
        "saved",
        help="What the ControlNet to start from was trained with: what its configuration says, or "
        "what diffusers' script or Stability's Canny was trained with, which theirs leaves out.",
    )
    controlnet_kind: ControlNetKind | None = option(
        None,
        help="Blocks of a new ControlNet: as the base's, of picture and text (joint, the default), "
        "or of the picture alone, as Stability's for SD3.5 large (stability), which are smaller.",
    )
    pooled_projection: PooledProjection | None = option(
        None,
        help="What the ControlNet gets beside its control: the prompt's pooled embedding and the "
        "VAE's shift, or zeros and no shift, as ComfyUI drives ControlNets and InstantX trains "
        "them. By default as the ControlNet to start from was trained; a new one: "
        f"{DEFAULT_POOLED_PROJECTION}.",
    )
    ema_decay: float | None = option(
        None,
        help="Also save a moving average of the weights with this decay, e.g. 0.999, in "
        "controlnet_ema/.",
    )
    output_dir: Path = option(
        Path("controlnet-model"),
        help="Folder for the ControlNet, checkpoints and logs.",
        heading="Output",
    )
    checkpointing_steps: int = option(500, help="Steps between checkpoints.")
    keep_best: bool = option(
        False,
        help="Keep the ControlNet of the lowest held-out loss in best/, beside the last; the cache "
        "needs held-out rows (precompute --validation-rows).",
    )
    checkpoints_total_limit: int | None = option(
        None, help="Number of checkpoints to keep; older ones are deleted. By default all are kept."
    )
    resume_from_checkpoint: str | None = option(
        None,
        help="A checkpoint's folder, or `latest`; `latest` starts from the beginning if there is "
        "none.",
    )
    train_batch_size: int = option(4, help="Samples per step and process.", heading="Training")
    gradient_accumulation_steps: int = option(1, help="Batches per optimiser step.")
    max_train_steps: int | None = option(None, help="Number of optimiser steps.")
    num_train_epochs: int = option(1, help="Passes over the data; --max-train-steps overrides it.")
    learning_rate: float = option(5e-6, help="Peak learning rate.")
    scale_lr: bool = option(
        False, help="Multiply --learning-rate by batch size, accumulation steps and processes."
    )
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
    ] = option("constant", help="Learning rate schedule, of diffusers.")
    lr_warmup_steps: int = option(
        500, help="Steps over which the learning rate rises, in schedules that warm up."
    )
    lr_num_cycles: int = option(1, help="Cycles of cosine_with_restarts.")
    lr_power: float = option(1.0, help="Power of polynomial.")
    max_grad_norm: float = option(1.0, help="Clip gradients to this norm; 0 turns clipping off.")
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        help="Whether to stop or continue after a gradient that is not finite. Either way its "
        "step is skipped and its samples are named.",
    )
    seed: int = option(0, help="Seed for order, noise, timesteps and dropped prompts.")
    estimate: bool = option(
        False,
        help="Print how much memory the run would need, and what would reduce it; do not train. "
        "Needs no cache, weights or GPU.",
        heading="Speed and memory",
    )
    resolution: int | None = option(
        None, help="With --estimate and without --cache: side of the square pictures, in pixels."
    )
    max_sequence_length: int | None = option(None, help="Likewise: T5 tokens, 77 by default.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None,
        help="Number format of the frozen base and of the arithmetic; by default accelerate's.",
    )
    checkpointing: Checkpointing = option(
        "none",
        help="Activations that are recomputed instead of stored: none; the ControlNet's, as "
        "--gradient-checkpointing says too; those of both networks that are cheap to compute; or "
        "all. Same results; each level takes less memory than the one before, and more time.",
        switches={"gradient_checkpointing": "controlnet"},
    )
    quantize_base: Literal["int8", "fp8", "nf4"] | None = option(
        None, help="Store the frozen base in 8 or 4 bit; nf4 needs the extra [bitsandbytes]."
    )
    bf16_weights: bool = option(
        False,
        help="Store the ControlNet in bfloat16 with stochastic rounding: 2 bytes per weight and "
        "gradient instead of 4; results differ; one GPU only.",
    )
    fused_backward_pass: bool = option(
        False,
        help="Take the optimiser's step within the backward pass and free each gradient at once; "
        "needs --max-grad-norm 0, no accumulation, one GPU.",
    )
    offload_optimizer: bool = option(
        False, help="Keep the optimiser's state in host memory; same results, slower."
    )
    offload_activations: bool = option(
        False, help="Keep activations in host memory; same results, slower."
    )
    offload_base: int = option(
        0,
        help="Blocks of the frozen base to keep in host memory, or all if it has fewer; each is "
        "brought to the device ahead of its use; same results, slower.",
    )
    compile: bool = option(
        False,
        help="Compile the blocks of both networks; the first step then takes a minute or more.",
    )
    allow_tf32: bool = option(
        False, help="Use TensorFloat-32 for float32 products; on Ampere and later."
    )
    deterministic: bool = option(
        False,
        help="Compute the same bits in every run on the same GPUs, with torch's deterministic "
        "algorithms. Slower: attention's backward pass adds in a fixed order. CPUs do without.",
    )
    validation_steps: int = option(
        100,
        help="Steps between validations, which draw the cache's validation pairs and measure the "
        "loss on its held-out rows; the first is before training; 0 turns them off.",
        heading="Validation",
    )
    validation_batch_size: int | None = option(
        None, help="Held-out samples per batch and process; by default --train-batch-size."
    )
    num_validation_images: int = option(4, help="Pictures per validation pair.")
    validation_inference_steps: int = option(20, help="Sampling steps per picture.")
    validation_guidance_scale: float = option(7.0, help="Classifier-free guidance; 1 turns it off.")
    validation_decode: Literal["vae", "cpu", "latents"] = option(
        "vae",
        help="Decode validation pictures on the training device, on the CPU, or not at all: "
        "python -m infer decode does it elsewhere.",
    )
    evaluate: str | None = option(
        None,
        help="Train nothing: measure this ControlNet as a validation does, and draw its pictures; "
        "a checkpoint, a ControlNet's folder or a hub id.",
    )
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"] = option(
        "logit_normal", help="How timesteps are sampled and losses weighted.", heading="Objective"
    )
    logit_mean: float = option(0.0, help="Mean of logit_normal.")
    logit_std: float = option(1.0, help="Standard deviation of logit_normal.")
    mode_scale: float = option(1.29, help="Scale of mode.")
    shift: str | None = option(
        None,
        help="Shift of the noise schedule in training: a number, or resolution: the base's own at "
        "the size that it was made for, less for smaller pictures. By default the base's own.",
    )
    min_timestep: int = option(0, help="Lowest timestep that is drawn; 0 is the picture.")
    max_timestep: int = option(1000, help="Highest timestep that is drawn; 1000 is noise.")
    stratified_timesteps: bool = option(
        False,
        help="Spread the timesteps of each step's samples evenly over their distribution: the same "
        "objective, with less noise in the loss.",
    )
    precondition_outputs: int = option(
        1, help="1: compare clean latents in the loss; 0: compare velocities (noise - latent)."
    )
    optimizer: str = option(
        ADAMW,
        help=f"{', '.join(NAMED)}, or any other of torch's form as package.module:Class. "
        "adamw8bit and lion need the extra [bitsandbytes], prodigy and schedulefree their own.",
        heading="Optimiser",
        switches={"use_8bit_adam": ADAMW_8BIT},
    )
    optimizer_args: tuple[str, ...] = option(
        (),
        help="key=value of the optimiser, the value as in Python, e.g. betas=0.9,0.99; repeatable. "
        "Its learning rate is --learning-rate.",
    )
    adam_beta1: float = option(0.9, help="AdamW's first moment, in 32 or 8 bit.")
    adam_beta2: float = option(0.999, help="AdamW's second moment.")
    adam_weight_decay: float = option(1e-2, help="AdamW's weight decay.")
    adam_epsilon: float = option(1e-8, help="AdamW's epsilon.")
    report_to: Tracker = option(
        "tensorboard",
        help="Tracker, of those that accelerate drives; all: those that are installed.",
        heading="Logging and publishing",
    )
    logging_steps: int = option(10, help="Steps between logged losses and learning rates.")
    logging_dir: str = option(
        "logs", help="Folder for the tracker's logs, inside the output folder."
    )
    tracker_project_name: str = option(
        "train_controlnet", help="Project name given to the tracker."
    )
    dashboard: bool = option(
        False,
        help="Keep progress.html in the output folder: curves, pictures and advice in one file, "
        "written anew at each validation.",
    )
    push_to_hub: bool = option(False, help="Upload the ControlNet with its model card at the end.")
    hub_model_id: str | None = option(
        None, help="Repository to upload to; by default named like the output folder."
    )
    hub_token: str | None = option(
        None, secret=True, help="Token for the hub; prefer `hf auth login`."
    )

    def __post_init__(self) -> None:
        """Refuse settings that cannot work, before anything is loaded.

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
            "validation_batch_size",
            "num_validation_images",
            "validation_inference_steps",
            "logging_steps",
        )
        not_negative = (
            "seed",
            "validation_steps",
            "dataloader_num_workers",
            "lr_warmup_steps",
            "offload_base",
        )
        self._check_schedule()
        self._check_sets()
        for names, least in ((at_least_one, 1), (not_negative, 0)):
            for name in names:
                value = getattr(self, name)
                if value is not None and value < least:
                    raise ConfigError(f"{flag(name)} {value}: must be at least {least}.")
        self._check_estimate()
        self._check_fused_backward()
        self._check_optimizer()
        if self.convention != "saved" and self.controlnet_model_name_or_path is None:
            raise ConfigError(
                f"--convention {self.convention}: is about the ControlNet to start from; give "
                "--controlnet-model-name-or-path, or leave it out."
            )
        if not 0 < self.local_cache_gb < math.inf:
            raise ConfigError(f"--local-cache-gb {self.local_cache_gb:g}: must be above 0.")
        if not 0 <= self.max_grad_norm < math.inf:
            raise ConfigError(f"--max-grad-norm {self.max_grad_norm:g}: must be at least 0.")
        if self.offload_base and self.compile:
            raise ConfigError(
                f"--offload-base {self.offload_base}: blocks that are compiled stay on the device; "
                "leave out --compile or --offload-base."
            )
        if self.checkpointing == "selective" and self.compile:
            raise ConfigError(
                "--checkpointing selective: what a compiled block computes cannot be stored in "
                "part; leave out --compile, or take --checkpointing controlnet or full."
            )
        if self.precondition_outputs not in (0, 1):
            raise ConfigError(
                f"--precondition-outputs {self.precondition_outputs}: must be 0 or 1."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"--ema-decay {self.ema_decay}: must be between 0 and 1, e.g. 0.999.")
        for name in ("proportion_empty_prompts", *(f"dropout_{part}" for part in DROPPED)):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: must be in 0 to 1.")
        if self.dropout_control == 1:
            raise ConfigError(
                "--dropout-control 1.0: the ControlNet would never see its control; give less."
            )

    def _check_fused_backward(self) -> None:
        """Refuse settings that need all gradients at once beside --fused-backward-pass.

        Raises:
            ConfigError: naming the option at fault.
        """
        rules = (
            (
                self.max_grad_norm > 0,
                f"--max-grad-norm {self.max_grad_norm:g} clips the norm of all gradients "
                "together; --max-grad-norm 0 leaves that out",
            ),
            (
                self.gradient_accumulation_steps > 1,
                "--gradient-accumulation-steps keeps gradients from batch to batch",
            ),
            (
                self.mixed_precision == "fp16",
                "--mixed-precision fp16 looks at all of them to find its scale; use bf16",
            ),
        )
        reasons = [reason for broken, reason in rules if broken]
        if self.fused_backward_pass and reasons:
            raise ConfigError(f"--fused-backward-pass: {'; '.join(reasons)}.")

    def _check_optimizer(self) -> None:
        """Refuse what the chosen optimiser does not go with, as far as its name tells.

        Raises:
            ConfigError: naming the option at fault.
        """
        given = parse_arguments(self.optimizer_args)
        chosen = f"--optimizer {self.optimizer}"
        if not is_known(self.optimizer):
            raise ConfigError(f"{chosen}: none of {', '.join(NAMED)}, nor package.module:Class.")
        for key, names in ADAM_OPTIONS.items():
            flags = " and ".join(map(flag, names))
            if self.optimizer in ADAMS and key in given:
                raise ConfigError(f"--optimizer-args {key}=…: give {flags}.")
            for name in names:
                value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
                if self.optimizer not in ADAMS and value != default:
                    raise ConfigError(
                        f"{flag(name)} {value:g}: is AdamW's; what {chosen} takes is set with "
                        f"--optimizer-args {key}=…. Leave it out; where a file sets it, give "
                        f"{flag(name)} {default:g}."
                    )
        for name in ("bf16_weights", "fused_backward_pass", "offload_optimizer"):
            if getattr(self, name) and not find_named(self.optimizer).by_weight:
                raise ConfigError(
                    f"{flag(name)}: steps one weight after the other, and {chosen} may look at all "
                    "together; leave one out."
                )
        if self.optimizer == SCHEDULE_FREE:
            if self.ema_decay is not None:
                raise ConfigError(
                    f"--ema-decay {self.ema_decay}: {chosen} saves an average already; leave it "
                    "out."
                )
            if self.lr_scheduler not in ("constant", "constant_with_warmup"):
                raise ConfigError(
                    f"--lr-scheduler {self.lr_scheduler}: {chosen} takes the place of a schedule; "
                    "give constant, or constant_with_warmup."
                )

    def _check_estimate(self) -> None:
        """Refuse what describes a cache, unless an estimate has to do without one.

        Raises:
            ConfigError: naming the option.
        """
        described = [
            name
            for name in ("resolution", "max_sequence_length")
            if getattr(self, name) is not None
        ]
        for name in described:
            if not self.estimate:
                raise ConfigError(f"{flag(name)}: {AT_PRECOMPUTE}")
            if self.cache:
                raise ConfigError(
                    f"{flag(name)} {getattr(self, name)}: --cache {self.cache[0]} says it; "
                    "leave one out."
                )
        if self.estimate and self.evaluate is not None:
            raise ConfigError("--estimate and --evaluate: leave one out.")
        if self.estimate and not self.cache:
            if self.resolution is None:
                raise ConfigError(
                    "--estimate: needs --cache, or --resolution for a cache that is yet to be "
                    "made, e.g. --resolution 1024."
                )
            check_resolution(self.resolution)
            if self.max_sequence_length is not None:
                check_sequence_length(self.max_sequence_length)

    def _check_sets(self) -> None:
        """Refuse controls, weights and repeats that do not go with the caches."""
        count = len(self.cache)
        if not self.cache and not self.estimate:
            raise ConfigError("--cache: give at least one.")
        controls = self.conditioning_name
        if len(controls) not in (1, count):
            raise ConfigError(
                f"--conditioning-name {' '.join(controls)}: {len(controls)} for {count} caches; "
                "give one for all, or one for each."
            )
        for name in ("weights", "repeats"):
            values = getattr(self, name)
            given = f"{flag(name)} {' '.join(f'{value:g}' for value in values)}"
            if values and len(values) != count:
                raise ConfigError(
                    f"{given}: {len(values)} for {count} caches; give one for each --cache."
                )
            if values and count == 1:
                raise ConfigError(
                    f"{given}: is about several caches; of one, --num-train-epochs says how often "
                    "it comes."
                )
        if self.weights and self.repeats:
            raise ConfigError("--weights and --repeats: give one of them.")
        if self.weights and (min(self.weights) < 0 or not sum(self.weights)):
            raise ConfigError(
                f"--weights {' '.join(f'{value:g}' for value in self.weights)}: must be at least "
                "0, and one above."
            )
        if self.repeats and min(self.repeats) < 1:
            raise ConfigError(
                f"--repeats {' '.join(map(str, self.repeats))}: must be at least 1; --weights 0 "
                "leaves a cache out."
            )

    def _check_schedule(self) -> None:
        """Refuse a shift that is none, and timesteps out of order."""
        low, high = self.min_timestep, self.max_timestep
        if not 0 <= low < high <= 1000:
            raise ConfigError(
                f"--min-timestep {low} and --max-timestep {high}: between 0 and 1000, the lowest "
                "before the highest."
            )
        if self.shift is None or self.shift == BY_RESOLUTION:
            return
        try:
            number = float(self.shift)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise ConfigError(f"--shift {self.shift}: a number above 0, or {BY_RESOLUTION}.")
