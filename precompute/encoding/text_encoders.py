"""The text encoders: CLIP-L, CLIP-G and T5.

They compute what diffusers' StableDiffusion3Pipeline.encode_prompt computes, without the zeros that
it appends to CLIP's width.

Axes: B prompts, T tokens, W embedding width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import ShardError
from precompute.encoding.batch_size import BatchSize, in_parts
from precompute.fingerprints.encoder_spec import CLIP_COMPONENTS, T5_COMPONENTS, TextSettings
from sd3.pretrained import component_variant


@dataclass(frozen=True)
class Tokens:
    """A batch of prompts, tokenized.

    Attributes:
        clip: ids for each CLIP encoder, [B, T].
        t5: ids for T5, [B, T].
        t5_lengths: how many T5 tokens each prompt has, the end token included, uncut.
    """

    clip: list[Tensor]
    t5: Tensor
    t5_lengths: list[int]


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
                # Load onto the device directly, so that there are never two copies.
                device_map={"": str(device)},
            )
            return model.eval()

        self.tokenizers = [
            CLIPTokenizer.from_pretrained(base, subfolder=name) for name, _ in CLIP_COMPONENTS
        ]
        self.clips = [load(CLIPTextModelWithProjection, name) for _, name in CLIP_COMPONENTS]
        self.t5_tokenizer = T5TokenizerFast.from_pretrained(base, subfolder=T5_COMPONENTS[0])
        self.t5 = load(T5EncoderModel, T5_COMPONENTS[1])

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Return the tokens of a batch of prompts; must not run in two threads at once."""
        length = self.tokenizers[0].model_max_length
        uncut = self.t5_tokenizer(list(prompts), truncation=False, verbose=False).input_ids
        return Tokens(
            clip=[self._ids(tokenizer, prompts, length) for tokenizer in self.tokenizers],
            t5=self._ids(self.t5_tokenizer, prompts, self.settings.max_sequence_length),
            t5_lengths=[len(ids) for ids in uncut],
        )

    @torch.no_grad()
    def encode(self, tokens: Tokens, size: BatchSize) -> dict[str, Tensor]:
        """Return the embeddings of prompts, in the cache's number format.

        Args:
            tokens: of the prompts.
            size: how many prompts are encoded at once.

        Returns:
            `clip_embeds` [B, T, W], `t5_embeds` [B, T, W] and `pooled_embeds` [B, W], on the
            device.
        """
        embeds = in_parts(self._embeds, [tokens.t5, *tokens.clip], size)
        dtype = getattr(torch, self.settings.cache_dtype)
        return {name: tensor.to(dtype) for name, tensor in embeds.items()}

    def _embeds(self, t5: Tensor, *clip: Tensor) -> dict[str, Tensor]:
        hidden, pooled = [], []
        for ids, encoder in zip(clip, self.clips, strict=True):
            output = encoder(ids.to(self.device, non_blocking=True), output_hidden_states=True)
            # SD3 takes the projection of the end token and the last layer but one.
            pooled.append(output[0])
            hidden.append(output.hidden_states[-2])
        return {
            "clip_embeds": torch.cat(hidden, dim=-1),
            "t5_embeds": self.t5(t5.to(self.device, non_blocking=True))[0],
            "pooled_embeds": torch.cat(pooled, dim=-1),
        }

    def _ids(self, tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = tokens.input_ids
        return ids.pin_memory() if self.device.type == "cuda" else ids


@dataclass
class LongPrompts:
    """How many prompts have more T5 tokens than are kept, and the length of the longest prompt."""

    count: int = 0
    most_tokens: int = 0

    def add(self, num_tokens: int, limit: int) -> None:
        """Count a prompt if it has more tokens than the limit."""
        self.count += num_tokens > limit
        self.most_tokens = max(self.most_tokens, num_tokens)


def require_finite(tensors: dict[str, Tensor], prompt: str) -> None:
    """Raise unless all embeddings of a prompt are finite.

    Raises:
        ShardError: naming the prompt and the way out.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ShardError(
                f"{name} of the prompt {prompt[:80]!r} is not finite; half precision can overflow: "
                "run again with --text-dtype float32 or bfloat16, or --cache-dtype float32."
            )
