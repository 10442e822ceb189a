"""A precompute job: everything that is known and checked before the first byte is written."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from precompute import images, plan
from precompute.config import PrecomputeConfig
from precompute.fingerprint import hash_bytes
from precompute.images import BadImage
from precompute.latents import LatentSettings, latent_identity, latent_spec
from precompute.plan import ProductPlan, ShardPlan
from precompute.sources import Source, open_source
from precompute.text import COMPONENTS, TextSettings, text_identity, text_spec
from shards import manifest
from shards.device import pick_device
from shards.errors import ConfigError, ShardError
from shards.manifest import (
    LatentSpec,
    TextSpec,
    conditioning_folder,
    digest,
    validation_folder,
)
from shards.pretrained import find_base
from shards.records import record_bytes, record_key
from shards.sidecar import Skipped


@dataclass(frozen=True)
class ValidationPair:
    """A prompt and its conditioning image, fitted, [3, H, W] in 0 to 255."""

    prompt: str
    image_hash: str
    conditioning_image: Tensor

    @property
    def key(self) -> str:
        """The content part of the pair's record key."""
        return digest([self.prompt, self.image_hash])


@dataclass(frozen=True)
class Job:
    """What is to be made, from what, with what."""

    config: PrecomputeConfig
    source: Source
    base: Path
    device: torch.device
    bad: "BadRows"
    text_settings: TextSettings
    latent_settings: LatentSettings
    text_spec: TextSpec
    latent_spec: LatentSpec
    conditioning_spec: LatentSpec
    text_identity: str
    prompts: dict[str, str]
    text: ProductPlan
    latents: ProductPlan
    conditioning: ProductPlan
    validation: ProductPlan

    def products(self) -> dict[str, ProductPlan]:
        """Return the product plans by folder name, in the order they are made."""
        return {
            "text": self.text,
            "latents": self.latents,
            conditioning_folder(self.config.conditioning_name): self.conditioning,
            validation_folder(self.config.conditioning_name): self.validation,
        }


def prepare(config: PrecomputeConfig) -> Job:
    """Open and check the source and the base model, hash what they hold, and plan the shards.

    Raises:
        ConfigError: the source or base model cannot be used.
        ShardError: too many of the source's files are missing.
    """
    _check_output(config.output_dir)
    source = open_source(config.source)
    base = find_base(
        config.pretrained_model_name_or_path,
        (*COMPONENTS, "vae"),
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
    )
    text_settings = TextSettings(config.max_sequence_length, config.text_dtype, config.cache_dtype)
    latent_settings = LatentSettings(
        config.resolution,
        config.posterior,
        config.vae_dtype,
        config.cache_dtype,
        config.background,
    )
    texts = text_spec(base, text_settings)
    latents = latent_spec(base, latent_settings, "-1_1")
    conditioning = latent_spec(base, latent_settings, config.conditioning_range)
    pairs = _validation_pairs(config)

    rows = plan.plan_rows(source, plan.chosen(source.rows, config.max_train_samples, config.seed))
    bad = BadRows(len(rows), 0.0 if config.strict else config.max_bad_fraction)
    bad.add(Skipped(row.row.name, row.first_fault) for row in rows if row.first_fault)

    text_id = text_identity(base, config.variant, text_settings)
    latent_id = latent_identity(base, config.variant, latent_settings)
    side = config.resolution // latents.vae_scale_factor
    text, latent = texts.tensors(), latents.tensors("latent", (side, side))
    text_size = plan.records_per_shard(config.shard_mb, text)
    latent_size = plan.records_per_shard(config.shard_mb, latent)
    text_shards = plan.plan_text(plan.distinct_prompts(rows), text_id, text_size)
    cache = config.output_dir
    return Job(
        config=config,
        source=source,
        base=base,
        device=pick_device(config.device),
        bad=bad,
        text_settings=text_settings,
        latent_settings=latent_settings,
        text_spec=texts,
        latent_spec=latents,
        conditioning_spec=conditioning,
        text_identity=digest(text_id),
        prompts=plan.prompt_keys(text_shards),
        text=ProductPlan(cache / "text", text_shards, record_bytes(text)),
        latents=ProductPlan(
            cache / "latents",
            plan.plan_latents(rows, latent_id, latent_size),
            record_bytes(latent),
        ),
        conditioning=ProductPlan(
            cache / conditioning_folder(config.conditioning_name),
            plan.plan_conditioning(rows, latent_id, config.conditioning_range, latent_size),
            record_bytes(latent),
        ),
        validation=ProductPlan(
            cache / validation_folder(config.conditioning_name),
            _plan_validation(pairs, [text_id, latent_id, config.conditioning_range]),
            record_bytes(text) + record_bytes(latent) + 3 * config.resolution**2,
        ),
    )


class BadRows:
    """The rows that had to be left out, and the bound on their number.

    Args:
        num_rows: of the source.
        max_fraction: how many of them may be bad.
    """

    def __init__(self, num_rows: int, max_fraction: float) -> None:
        self.num_rows = num_rows
        self.max_fraction = max_fraction
        self.reasons: dict[str, str] = {}

    def add(self, rows: Iterable[Skipped]) -> None:
        """Count rows, each once.

        Raises:
            ShardError: more are bad than the settings allow; with the first of them.
        """
        for one in rows:
            self.reasons.setdefault(one.row, one.reason)
        if len(self.reasons) > self.max_fraction * self.num_rows:
            strict = "" if self.max_fraction else " (--strict)"
            bound = f"--max-bad-fraction {self.max_fraction:g}{strict}"
            raise ShardError(
                f"{len(self.reasons)} of {self.num_rows} rows cannot be used, more than "
                f"{bound} allows:\n{self.table()}\n"
                "Mend or remove them, or allow more. Finished shards are kept."
            )

    def table(self, limit: int = 20) -> str:
        """Return a line a row, the first `limit` of them."""
        lines = [f"  {row}: {reason}" for row, reason in list(self.reasons.items())[:limit]]
        more = len(self.reasons) - limit
        return "\n".join([*lines, f"  … and {more} more"] if more > 0 else lines)


def _check_output(cache: Path) -> None:
    """Refuse to write among files that are not a cache's."""
    ours = {
        "text",
        "latents",
        "conditioning",
        "validation",
        manifest.RUN,
        manifest.MANIFEST,
        manifest.PREVIOUS,
    }
    if cache.is_dir():
        strange = sorted(
            path.name for path in cache.iterdir() if path.name.split(".tmp-")[0] not in ours
        )
        if strange:
            raise ConfigError(
                f"--output-dir {cache}: not a cache, it holds {', '.join(strange[:4])}; "
                "give a new or empty folder, or a cache."
            )


def _validation_pairs(config: PrecomputeConfig) -> list[ValidationPair]:
    pairs = []
    for prompt, path in config.validation_pairs():
        try:
            image, data = images.load(path, config.background)
        except BadImage as error:
            raise ConfigError(f"--validation-image {path}: {error}.") from error
        pixels = images.to_uint8(images.fit(image, config.resolution))
        pairs.append(ValidationPair(prompt, hash_bytes(data), pixels))
    return pairs


def _plan_validation(pairs: list[ValidationPair], identity: list[object]) -> list[ShardPlan]:
    if not pairs:
        return []
    return [ShardPlan(0, pairs, digest([identity, [pair.key for pair in pairs]]))]


def validation_key(row: int, pair: ValidationPair) -> str:
    """Return the key of a validation pair's record."""
    return record_key(0, row, pair.key)
