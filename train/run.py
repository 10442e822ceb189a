"""Stage 2 from front to back: networks, loop, checkpoints, validation, the trained ControlNet."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from shards.options import as_dict
from shards.pretrained import DATA_KEY
from shards.provenance import write_run
from train import checkpoints, models, setup, validation
from train.checkpoints import TrainState
from train.config import TrainConfig
from train.data import RankBatches, Samples, loader
from train.setup import Inputs
from train.step import batch_loss
from train.validation import Picture


def train(config: TrainConfig) -> None:
    """Train a ControlNet as the settings say and save it in `config.output_dir`.

    Raises:
        ConfigError: settings, base model, cache and checkpoint do not go together.
        ShardError: the cache is incomplete or damaged.
        OSError: the output cannot be written.
    """
    accelerator = setup.make_accelerator(config)
    inputs = setup.find_inputs(config, accelerator.num_processes)
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32

    if inputs.controlnet is None:
        controlnet = models.new_controlnet(
            inputs.base, config.variant, config.num_controlnet_layers
        )
    else:
        controlnet = models.load_controlnet(inputs.controlnet)
        models.check_controlnet(controlnet, inputs.base)
    weight_dtype = setup.WEIGHT_DTYPES[accelerator.mixed_precision]
    transformer = models.load_transformer(inputs.base, config.variant, weight_dtype)
    data = models.data_entry(inputs.cache.manifest, inputs.cache.conditioning_spec)
    controlnet.register_to_config(force_zeros_for_pooled_projection=False, **{DATA_KEY: data})
    models.freeze_unused(controlnet)
    controlnet.train()
    if config.gradient_checkpointing:
        controlnet.enable_gradient_checkpointing()
        transformer.enable_gradient_checkpointing()
    transformer.to(accelerator.device)

    step_samples = setup.samples_a_step(config, accelerator.num_processes)
    num_steps = setup.num_train_steps(config, inputs.order, step_samples)
    trained = [parameter for parameter in controlnet.parameters() if parameter.requires_grad]
    optimizer = setup.make_optimizer(config, trained, step_samples)
    schedule = setup.make_schedule(config, optimizer, num_steps)
    checkpoints.use_diffusers_format(accelerator)
    controlnet, optimizer, schedule = accelerator.prepare(controlnet, optimizer, schedule)
    if inputs.checkpoint is not None:
        checkpoints.check_same_model(inputs.checkpoint, accelerator.unwrap_model(controlnet))
        accelerator.load_state(str(inputs.checkpoint))
        # It counts batches, to know where an optimiser step ends; a checkpoint always is such an
        # end, but with another accumulation the count would say otherwise.
        accelerator.step = 0
        setup.set_learning_rate(schedule.scheduler, setup.peak_learning_rate(config, step_samples))

    if accelerator.is_main_process:
        _announce(config, inputs, controlnet, num_steps, step_samples)
        config.output_dir.mkdir(parents=True, exist_ok=True)
        write_run(config.output_dir, "train", config, num_steps=num_steps, data=data)
    if accelerator.log_with:
        flat = {key: value if value is not None else "" for key, value in as_dict(config).items()}
        accelerator.init_trackers(config.tracker_project_name, config=flat)

    state = _loop(
        config, inputs, accelerator, controlnet, transformer, optimizer, schedule, num_steps
    )

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoints.save_controlnet(accelerator.unwrap_model(controlnet), config.output_dir)
        click.echo(f"{config.output_dir}: ControlNet saved after {state.step} steps")
    accelerator.end_training()


def _loop(
    config: TrainConfig,
    inputs: Inputs,
    accelerator: Accelerator,
    controlnet: Any,
    transformer: Any,
    optimizer: Any,
    schedule: Any,
    num_steps: int,
) -> TrainState:
    """Take optimiser steps until `num_steps` are done; return where the run then stands."""
    device = accelerator.device
    objective = setup.make_objective(config, inputs, device)
    state = inputs.state
    samples = Samples(
        inputs.cache,
        inputs.order,
        seed=config.seed,
        proportion_empty_prompts=config.proportion_empty_prompts,
    )
    places = RankBatches(
        state.place,
        batch_size=config.train_batch_size,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
    )
    batches = loader(
        samples, places, num_workers=config.dataloader_num_workers, pin=device.type == "cuda"
    )
    accumulation = config.gradient_accumulation_steps
    step_samples = setup.samples_a_step(config, accelerator.num_processes)
    loss_sum, losses = torch.zeros((), device=device), 0
    bar = tqdm(
        total=num_steps,
        initial=min(state.step, num_steps),
        desc="train",
        unit="step",
        disable=None if accelerator.is_local_main_process else True,
    )
    while state.step < num_steps:
        for batch in itertools.islice(batches, accumulation):
            with accelerator.accumulate(controlnet):
                loss = batch_loss(batch.to(device), controlnet, transformer, objective)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(controlnet.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            # Summed where it is: reading it each step would make the device wait.
            loss_sum += loss.detach()
            losses += 1
        if not accelerator.optimizer_step_was_skipped:
            schedule.step()
        state = replace(state, step=state.step + 1, place=state.place + step_samples)
        bar.update()

        last = state.step == num_steps
        if state.step % config.logging_steps == 0 or last:
            mean = accelerator.reduce(loss_sum / losses, reduction="mean").item()
            lr = schedule.get_last_lr()[0]
            accelerator.log(
                {"loss": mean, "lr": lr, "epoch": inputs.order.epochs(state.place)},
                step=state.step,
            )
            bar.set_postfix(loss=f"{mean:.4f}", lr=f"{lr:.2g}")
            loss_sum, losses = torch.zeros((), device=device), 0
        if state.step % config.checkpointing_steps == 0 or last:
            checkpoints.save(accelerator, config.output_dir, state, config.checkpoints_total_limit)
        if inputs.validates and (state.step % config.validation_steps == 0 or last):
            _validate(config, inputs, accelerator, controlnet, transformer, state.step)
    bar.close()
    batches.close()
    return state


def _validate(
    config: TrainConfig,
    inputs: Inputs,
    accelerator: Accelerator,
    controlnet: Any,
    transformer: Any,
    step: int,
) -> None:
    """Draw the validation pairs, shared out among the processes, the same noise each time."""
    model = accelerator.unwrap_model(controlnet)
    model.eval()
    spec = inputs.cache.manifest.latent_spec
    numbered = list(enumerate(validation.read_pairs(inputs.cache)))
    mine = numbered[accelerator.process_index :: accelerator.num_processes]
    negative = validation.negative_embeds(inputs.cache)
    scheduler = models.load_scheduler(inputs.base)
    latents = []
    for number, pair in mine:
        shape = (config.num_validation_images, *pair.conditioning_latent.shape)
        generator = torch.Generator().manual_seed(config.seed + number)
        latents.append(
            validation.sample(
                transformer,
                model,
                scheduler,
                pair,
                negative,
                torch.randn(shape, generator=generator).to(accelerator.device),
                num_inference_steps=config.validation_inference_steps,
                guidance_scale=config.validation_guidance_scale,
            )
        )
    images = validation.decode(inputs.base, config.variant, spec, latents, accelerator.device)
    model.train()
    drawn = [
        Picture(number, pair, of_pair) for (number, pair), of_pair in zip(mine, images, strict=True)
    ]
    _save_pictures(config.output_dir / "validation" / f"step-{step:06d}", drawn)
    pictures = gather_object(drawn)
    if accelerator.is_main_process:
        _log_pictures(accelerator, sorted(pictures, key=lambda one: one.number), step)


def _save_pictures(folder: Path, pictures: list[Picture]) -> None:
    """Save each pair as one PNG: the conditioning image, then what came of it."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        conditioning = picture.pair.conditioning_image.permute(1, 2, 0).numpy()
        row = np.concatenate([conditioning, *picture.images], axis=1)
        Image.fromarray(row).save(folder / f"{picture.number}.png")


def _log_pictures(accelerator: Accelerator, pictures: list[Picture], step: int) -> None:
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        for picture in pictures:
            conditioning = picture.pair.conditioning_image.permute(1, 2, 0).numpy()
            images = np.stack([conditioning, *picture.images])
            tracker.log_images(
                {f"{picture.number}: {picture.pair.prompt}": images}, step=step, **layout
            )


def _announce(
    config: TrainConfig, inputs: Inputs, controlnet: Any, num_steps: int, step_samples: int
) -> None:
    millions = sum(p.numel() for p in controlnet.parameters() if p.requires_grad) / 1e6
    start = f"resuming {inputs.checkpoint}" if inputs.checkpoint else "starting anew"
    order = inputs.order
    buckets = ""
    if order.several_buckets:
        shapes = {order.buckets[shard] for shard in order.shards}
        buckets = f" in {len(shapes)} buckets, filled up to {order.start(1)} an epoch"
    click.echo(
        f"train: {order.num_records} samples{buckets}, {num_steps} steps of {step_samples}, "
        f"{millions:.1f} M parameters to train, {start}"
    )
    if config.validation_steps > 0 and not inputs.validates:
        click.echo("train: the cache has no validation pairs, so no pictures will be drawn")
