"""Publishing the trained ControlNet: its model card, and the upload to the hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData

from common.atomic_files import write_text
from common.errors import ConfigError, RunError
from common.options import as_dict
from common.provenance import commit, versions
from sd3.pretrained import DATA_KEY, is_hub_id
from train.assembly import Run
from train.config import TrainConfig
from train.saving.controlnet import EMA_FOLDER
from train.validation.sampling import read_pairs

CARD = "README.md"
TAGS = ("controlnet", "diffusers-training", "sd3", "sd3-diffusers", "text-to-image")
# Paths of this machine do not go into the card.
PRIVATE = ("output_dir", "cache", "local_cache_dir", "cache_dir", "logging_dir")


def create_repository(config: TrainConfig) -> None:
    """Create the repository to upload to, so that a refusal comes before training.

    Raises:
        ConfigError: the hub refuses it, or cannot be reached.
    """
    try:
        HfApi(token=config.hub_token).create_repo(_repository(config), exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--push-to-hub: {_repository(config)} cannot be made ({_first_line(error)}). "
            "Log in with hf auth login, or check --hub-model-id."
        ) from error


def push(config: TrainConfig) -> str:
    """Upload the ControlNet, its card and the last validation pictures.

    Returns:
        A line with the address of the upload.

    Raises:
        RunError: the hub refuses them, or cannot be reached; the local files stay.
    """
    api = HfApi(token=config.hub_token)
    repository = _repository(config)
    pictures = [path.relative_to(config.output_dir).as_posix() for path in _pictures(config)]
    weights = ("config.json", "diffusion_pytorch_model*")
    try:
        upload = api.upload_folder(
            repo_id=api.create_repo(repository, exist_ok=True).repo_id,
            folder_path=config.output_dir,
            commit_message="End of training",
            allow_patterns=[
                CARD,
                *weights,
                *(f"{EMA_FOLDER}/{name}" for name in weights),
                *pictures,
            ],
        )
    except (OSError, ValueError) as error:
        raise RunError(
            f"--push-to-hub: the upload to {repository} failed ({_first_line(error)}). The "
            f"ControlNet is in {config.output_dir}: hf upload {repository} {config.output_dir}"
        ) from error
    return f"uploaded to {upload.commit_url}"


def write_card(run: Run) -> None:
    """Write the model card beside the ControlNet."""
    write_text(run.config.output_dir / CARD, model_card(run))


def model_card(run: Run) -> str:
    """Return the card as Markdown: what the ControlNet is, how to load it, how it was made."""
    config, network = run.config, run.accelerator.unwrap_model(run.controlnet)
    data: dict[str, Any] = network.config[DATA_KEY]
    base = config.pretrained_model_name_or_path
    name = config.hub_model_id or config.output_dir.name
    num_layers, num_images = network.config.num_layers, run.inputs.order.num_records
    return f"""---
{_metadata(base)}
---

# {name}

A ControlNet of {num_layers} blocks for {base}, trained on {num_images} images at
{data["width"]} x {data["height"]} pixels with the control "{config.conditioning_name}".

## How to use it

{_example(name, base, data)}
{_ema_note(run)}
## Pictures

{_gallery(run) or "None were drawn while it was trained."}

From left to right: the conditioning image, and what came of it after {run.num_steps} steps.

## How it was made

{_origin(run, data)}

The licence of the base model applies to what is derived from it.
"""


def _metadata(base: str) -> str:
    """Return the YAML that the hub reads."""
    metadata: str = ModelCardData(
        base_model=base if is_hub_id(base) and not Path(base).is_dir() else None,
        library_name="diffusers",
        tags=list(TAGS),
        inference=True,
    ).to_yaml()
    return metadata


def _example(name: str, base: str, data: dict[str, Any]) -> str:
    """Return Python that loads the ControlNet and draws a picture."""
    return f"""```python
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from diffusers.utils import load_image

controlnet = SD3ControlNetModel.from_pretrained("{name}", torch_dtype=torch.float16)
pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
    "{base}", controlnet=controlnet, torch_dtype=torch.float16
)
image = pipeline(
    "a prompt",
    control_image=load_image("conditioning.png"),
    height={data["height"]},
    width={data["width"]},
    max_sequence_length={data["max_sequence_length"]},
).images[0]
```"""


def _ema_note(run: Run) -> str:
    """Return where the averaged weights are, or nothing if there are none."""
    if run.ema is None:
        return ""
    return (
        f"\nA moving average of the weights (decay {run.config.ema_decay}) is in `{EMA_FOLDER}/`: "
        f'pass `subfolder="{EMA_FOLDER}"`.\n'
    )


def _gallery(run: Run) -> str:
    """Return the last validation's pictures, each under its prompt."""
    paths = _pictures(run.config)
    if not paths:
        return ""
    # A run without validation may follow one that drew.
    prompts = [pair.prompt for pair in run.inputs.pairs or read_pairs(run.inputs.cache)]
    entries = []
    for path in paths:
        number, _, ema = path.stem.partition("-")
        prompt = prompts[int(number)] + (", averaged weights" if ema else "")
        address = path.relative_to(run.config.output_dir).as_posix()
        entries.append(f"{prompt}\n\n![{path.stem}]({address})")
    return "\n\n".join(entries)


def _origin(run: Run, data: dict[str, Any]) -> str:
    """Return the versions, data and settings that the ControlNet was made with."""
    made_with = ", ".join(f"{library} {version}" for library, version in versions().items())
    settings = "\n".join(
        f"    {key} = {value}"
        for key, value in as_dict(run.config).items()
        if key not in PRIVATE and value is not None
    )
    return f"""{run.num_steps} steps; made with {made_with}; \
commit {commit() or "unknown"} of the training code.

- latents: `{data["latents_fingerprint"]}`
- prompts: `{data["text_fingerprint"]}`

{settings}"""


def _repository(config: TrainConfig) -> str:
    return config.hub_model_id or config.output_dir.resolve().name


def _pictures(config: TrainConfig) -> list[Path]:
    """Return the last validation's pictures."""
    steps = sorted((config.output_dir / "validation").glob("step-*[0-9]"))
    return sorted(steps[-1].glob("*.png")) if steps else []


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
