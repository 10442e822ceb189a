"""The ControlNet on disk: in checkpoints and as a run's result, as diffusers loads it."""

import filecmp
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import SD3ControlNetModel
from safetensors import SafetensorError
from torch import Tensor

from common.atomic_files import give_usual_permissions, sync_folder, sync_tree
from common.errors import RunError
from sd3.finite import nonfinite_weight
from train.optim.ema import Ema
from train.processes.agreement import main_decides
from train.processes.sharding import full_state_dict

CONTROLNET_FOLDER = "controlnet"
EMA_FOLDER = "controlnet_ema"


def use_diffusers_format(accelerator: Accelerator) -> None:
    """Make accelerate's checkpoints hold the ControlNet as a folder that diffusers loads."""

    def save_model(models: list[Any], weights: list[Any], folder: str) -> None:
        for model in models:
            save_controlnet(accelerator, model, Path(folder) / CONTROLNET_FOLDER)
        weights.clear()

    def load_model(models: list[Any], folder: str) -> None:
        while models:
            unwrapped = accelerator.unwrap_model(models.pop())
            saved = SD3ControlNetModel.from_pretrained(folder, subfolder=CONTROLNET_FOLDER)
            unwrapped.load_state_dict(saved.state_dict())

    accelerator.register_save_state_pre_hook(save_model)
    accelerator.register_load_state_pre_hook(load_model)


def restore_ema(checkpoint: Path, ema: Ema, num_steps: int) -> None:
    """Continue from a checkpoint's average of `num_steps` updates, if it has one."""
    if num_steps:
        saved = SD3ControlNetModel.from_pretrained(checkpoint, subfolder=EMA_FOLDER)
        ema.restore(saved.state_dict(), num_steps)


def save_result(
    accelerator: Accelerator, controlnet: Any, ema: Ema | None, output_dir: Path
) -> None:
    """Save the trained ControlNet into the run's folder, and its average into `EMA_FOLDER` there.

    Every process must call this, with the ControlNet as accelerate prepared it.

    Raises:
        RunError: a weight is not finite; nothing is saved.
        OSError: it cannot be written; raised on all processes.
    """
    replace_controlnet(accelerator, controlnet, output_dir)
    if ema is not None:
        replace_controlnet(accelerator, controlnet, output_dir / EMA_FOLDER, ema)


def is_same_controlnet(one: Path, other: Path) -> bool:
    """Return whether two folders hold the same ControlNet, byte for byte."""
    names = [
        {path.name for path in (folder / "config.json", *folder.glob("diffusion_pytorch_model*"))}
        for folder in (one, other)
    ]
    return names[0] == names[1] and all(
        (other / name).is_file() and filecmp.cmp(one / name, other / name, shallow=False)
        for name in names[0]
    )


def save_controlnet(
    accelerator: Accelerator, controlnet: Any, folder: Path, average: Ema | None = None
) -> None:
    """Save all weights of a ControlNet, sharded or not, in diffusers' format.

    Every process must call this, with the ControlNet as accelerate prepared it.

    Args:
        accelerator: prepared the ControlNet.
        controlnet: the ControlNet.
        folder: where to save it.
        average: saved in place of the weights that it averages, in float32.

    Raises:
        RunError: a weight is not finite; nothing is saved.
        OSError: it cannot be written; raised on all processes.
    """
    weights = full_state_dict(
        accelerator, controlnet, None if average is None else average.named_weights()
    )
    main_decides(lambda: _refuse_nonfinite(weights))
    config = accelerator.unwrap_model(controlnet).config

    def write() -> None:
        whole = {
            name: tensor.float() if average is not None else tensor
            for name, tensor in weights.items()
        }
        with torch.device("meta"):
            network = SD3ControlNetModel.from_config(config)
        network.load_state_dict(whole, assign=True)
        try:
            network.save_pretrained(str(folder))
            for path in folder.glob("*.safetensors"):
                give_usual_permissions(path)
        except SafetensorError as error:  # of a full disk, too
            raise OSError(str(error).splitlines()[0]) from error

    main_decides(write)


def _refuse_nonfinite(weights: dict[str, Tensor]) -> None:
    if (name := nonfinite_weight(weights.items())) is not None:
        raise RunError(
            f"the weight {name} is no longer finite, so the ControlNet is not saved; go on from an "
            "earlier checkpoint with a lower --learning-rate"
        )


def replace_controlnet(
    accelerator: Accelerator, controlnet: Any, folder: Path, average: Ema | None = None
) -> None:
    """Save a ControlNet over an earlier one, so that an interruption leaves no mixture of both.

    Every process must call this; see `save_controlnet`.
    """
    partial = folder / "controlnet.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        save_controlnet(accelerator, controlnet, partial, average)
        main_decides(lambda: _put_in_place(partial, folder))
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Move a ControlNet's files from a temporary folder over those of an earlier one."""
    sync_tree(partial)
    # The configuration is removed first and comes last: without it the folder is not a model.
    for stale in (folder / "config.json", *folder.glob("diffusion_pytorch_model*")):
        stale.unlink(missing_ok=True)
    for file in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        sync_folder(folder)
        file.replace(folder / file.name)
    partial.rmdir()
    sync_folder(folder)
