"""Publishing the trained ControlNet on the hub."""

import shlex
import threading
from pathlib import Path

from huggingface_hub import HfApi

from common.errors import ConfigError, RunError, ShardError
from shards.remote.retry import with_retries
from train.config import TrainConfig
from train.saving.best import BEST_FOLDER
from train.saving.controlnet import EMA_FOLDER
from train.saving.model_card import CARD, pictures


def create_repository(config: TrainConfig) -> str:
    """Create the repository to upload to, so that a refusal comes before training.

    Returns:
        Its name with the owner's.

    Raises:
        ConfigError: the hub refuses it, or cannot be reached.
    """
    api = HfApi(token=config.hub_token)
    name = config.hub_model_id or config.output_dir.resolve().name
    try:
        created = with_retries(
            name, lambda: api.create_repo(name, exist_ok=True), threading.Event()
        )
    except ShardError as error:
        raise ConfigError(
            f"--push-to-hub: no repository {error}. Check the network, `hf auth login` and "
            "--hub-model-id; or leave out --push-to-hub and upload when the run has ended."
        ) from error
    return str(created.repo_id)


def push(config: TrainConfig, repository: str) -> str:
    """Upload the ControlNet, its card and the last validation pictures.

    Args:
        config: of the run.
        repository: what `create_repository` returned.

    Returns:
        A line with the address of the upload.

    Raises:
        RunError: the hub refuses them, or cannot be reached; the local files stay.
    """
    api = HfApi(token=config.hub_token)
    patterns = _patterns(config)

    def upload() -> str:
        done = api.upload_folder(
            repo_id=repository,
            folder_path=config.output_dir,
            commit_message="End of training",
            allow_patterns=patterns,
        )
        return str(done.commit_url)

    try:
        return f"uploaded to {with_retries(repository, upload, threading.Event())}"
    except (ShardError, OSError) as error:
        folder = shlex.quote(str(config.output_dir))
        included = " ".join(f"--include {shlex.quote(pattern)}" for pattern in patterns)
        raise RunError(
            f"--push-to-hub: not uploaded to {error}. The ControlNet is safe in "
            f"{config.output_dir}; to upload it: hf upload {repository} {folder} . {included}"
        ) from error


def _patterns(config: TrainConfig) -> list[str]:
    """Return what to upload of the output folder, which holds checkpoints and logs as well."""
    weights = ("config.json", "diffusion_pytorch_model*")
    patterns = [CARD, *weights]
    kept = [EMA_FOLDER, *([BEST_FOLDER] if config.keep_best else [])]
    for folder in kept:
        if (config.output_dir / folder).is_dir():
            patterns += [f"{folder}/{name}" for name in weights]
    drawn = {path.parent for path in pictures(config)}
    return patterns + [f"{_inside(config, folder)}/*.png" for folder in sorted(drawn)]


def _inside(config: TrainConfig, path: Path) -> str:
    return path.relative_to(config.output_dir).as_posix()
