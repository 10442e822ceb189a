"""The text pass: every distinct prompt through CLIP-L, CLIP-G and T5, once.

Axes: B prompts, T tokens, W embedding width. What is computed is what the stock
StableDiffusion3Pipeline.encode_prompt computes, less the zeros it pads CLIP's width with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from precompute.batching import batches
from precompute.fingerprint import hash_bytes, hash_component
from shards.errors import ConfigError, ShardError
from shards.manifest import TextSpec
from shards.pretrained import component_variant, read_config
from shards.records import Record, record_key

CLIP_COMPONENTS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
T5_COMPONENTS = ("tokenizer_3", "text_encoder_3")
COMPONENTS = (*(name for pair in CLIP_COMPONENTS for name in pair), *T5_COMPONENTS)


@dataclass(frozen=True)
class TextSettings:
    """What determines the embeddings of a prompt, besides the weights."""

    max_sequence_length: int
    compute_dtype: str
    cache_dtype: str


def text_spec(base: Path, settings: TextSettings) -> TextSpec:
    """Return the shapes that the base model's encoders will give, from their configurations.

    Raises:
        ConfigError: a configuration lacks a width.
    """
    widths = {
        (component, name): _width(base, component, name)
        for component, name in (
            ("text_encoder", "hidden_size"),
            ("text_encoder_2", "hidden_size"),
            ("text_encoder", "projection_dim"),
            ("text_encoder_2", "projection_dim"),
            ("text_encoder_3", "d_model"),
        )
    }
    return TextSpec(
        clip_tokens=clip_tokens(base),
        clip_width=widths["text_encoder", "hidden_size"] + widths["text_encoder_2", "hidden_size"],
        max_sequence_length=settings.max_sequence_length,
        t5_width=widths["text_encoder_3", "d_model"],
        pooled_width=widths["text_encoder", "projection_dim"]
        + widths["text_encoder_2", "projection_dim"],
        dtype=settings.cache_dtype,
    )


def _width(base: Path, component: str, name: str) -> int:
    width = read_config(base, component).get(name)
    if not isinstance(width, int):
        raise ConfigError(f"{base / component / 'config.json'}: no {name} in it.")
    return width


def clip_tokens(base: Path) -> int:
    """Return the CLIP prompt length: the stock pipeline takes the first tokenizer's for both."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(base / CLIP_COMPONENTS[0][0])
    return int(tokenizer.model_max_length)


def text_identity(base: Path, variant: str | None, settings: TextSettings) -> dict[str, Any]:
    """Return everything that the bytes of a text record depend on, but for the prompt."""
    return {
        "components": {name: hash_component(base / name, variant) for name in COMPONENTS},
        "max_sequence_length": settings.max_sequence_length,
        "compute_dtype": settings.compute_dtype,
        "cache_dtype": settings.cache_dtype,
    }


def prompt_key(shard: int, row: int, prompt: str) -> str:
    """Return the key of a prompt's text record."""
    return record_key(shard, row, hash_bytes(prompt.encode()))


class TextEncoders:
    """The two CLIP encoders and T5 on a device.

    Args:
        base: model folder with tokenizers and text encoders.
        settings: token length and number formats.
        device: where they run.
        variant: variant of the weight files.
    """

    def __init__(
        self, base: Path, settings: TextSettings, device: torch.device, variant: str | None
    ) -> None:
        from transformers import (
            CLIPTextModelWithProjection,
            CLIPTokenizer,
            T5EncoderModel,
            T5TokenizerFast,
        )

        dtype = getattr(torch, settings.compute_dtype)
        self.settings = settings
        self.device = device

        def load(model_class: Any, name: str) -> Any:
            model = model_class.from_pretrained(
                base,
                subfolder=name,
                variant=component_variant(base / name, variant),
                dtype=dtype,
                use_safetensors=True,
            )
            return model.to(device).eval()

        self.tokenizers = [
            CLIPTokenizer.from_pretrained(base, subfolder=name) for name, _ in CLIP_COMPONENTS
        ]
        self.clips = [load(CLIPTextModelWithProjection, name) for _, name in CLIP_COMPONENTS]
        self.t5_tokenizer = T5TokenizerFast.from_pretrained(base, subfolder=T5_COMPONENTS[0])
        self.t5 = load(T5EncoderModel, T5_COMPONENTS[1])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return `clip_embeds` [B, T, W], `t5_embeds` [B, T, W] and `pooled_embeds` [B, W].

        They are on the CPU, in the cache's number format.
        """
        length = self.tokenizers[0].model_max_length
        hidden, pooled = [], []
        for tokenizer, clip in zip(self.tokenizers, self.clips, strict=True):
            output = clip(self._ids(tokenizer, prompts, length), output_hidden_states=True)
            # The projection of the end token, and the last but one layer: SD3's choice.
            pooled.append(output[0])
            hidden.append(output.hidden_states[-2])
        ids = self._ids(self.t5_tokenizer, prompts, self.settings.max_sequence_length)
        embeds = {
            "clip_embeds": torch.cat(hidden, dim=-1),
            "t5_embeds": self.t5(ids)[0],
            "pooled_embeds": torch.cat(pooled, dim=-1),
        }
        dtype = getattr(torch, self.settings.cache_dtype)
        return {name: tensor.to("cpu", dtype) for name, tensor in embeds.items()}

    def num_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return how many T5 tokens each prompt has, the end token included."""
        found = self.t5_tokenizer(list(prompts), truncation=False, verbose=False).input_ids
        return [len(ids) for ids in found]

    def _ids(self, tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = tokens.input_ids
        return ids.to(self.device)


@dataclass
class LongPrompts:
    """How many prompts had more T5 tokens than are kept, and the longest."""

    count: int = 0
    most_tokens: int = 0

    def add(self, num_tokens: Sequence[int], limit: int) -> None:
        """Count those of a batch."""
        self.count += sum(number > limit for number in num_tokens)
        self.most_tokens = max(self.most_tokens, *num_tokens)


def text_records(
    encoders: TextEncoders,
    shard: int,
    prompts: Sequence[str],
    batch_size: int,
    long_prompts: LongPrompts,
    bar: "tqdm[Any]",
) -> Iterator[Record]:
    """Yield the records of a shard's prompts; batches stay within the shard.

    Args:
        encoders: see there.
        shard: number of the shard.
        prompts: all of it.
        batch_size: prompts encoded at a time.
        long_prompts: counts those that are cut.
        bar: moves on a batch at a time.

    Raises:
        ShardError: an embedding is not finite, which half precision can cause.
    """
    for rows in batches(range(len(prompts)), batch_size):
        batch = [prompts[row] for row in rows]
        long_prompts.add(encoders.num_tokens(batch), encoders.settings.max_sequence_length)
        embeds = encoders.encode(batch)
        for at, (row, prompt) in enumerate(zip(rows, batch, strict=True)):
            tensors = {name: tensor[at] for name, tensor in embeds.items()}
            require_finite(tensors, prompt)
            yield Record(prompt_key(shard, row, prompt), tensors, {"prompt": prompt})
        bar.update(len(batch))


def require_finite(tensors: dict[str, Tensor], prompt: str) -> None:
    """Raise unless all embeddings of a prompt are numbers.

    Raises:
        ShardError: naming the prompt and the way out.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ShardError(
                f"{name} of the prompt {prompt[:80]!r} is not finite; half precision can overflow: "
                "run again with --text-dtype float32 or bfloat16, or --cache-dtype float32."
            )
