"""Prompt embeddings from a cache: inference then needs no text encoder."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError
from sd3.prompt_embeds import record_embeds
from shards.reading.cache import Cache


class CachedPrompts:
    """Embeddings that a cache holds for prompts.

    Args:
        cache: the cache to read from.
        prompts: every prompt of the run.

    Attributes:
        unknown: prompts that the cache does not hold.
        max_sequence_length: T5 tokens of the embeddings.
    """

    def __init__(self, cache: Cache, prompts: Iterable[str]) -> None:
        self._spec = cache.manifest.text_spec
        self.max_sequence_length = self._spec.max_sequence_length
        self.unknown: list[str] = []
        self._embeds: dict[str, tuple[Tensor, Tensor]] = {}
        # Records of validation pairs hold embeddings too.
        reader = cache.validation
        validation = {
            str(reader.metadata(*location).get("prompt", "")): location
            for location in reader.locations()
        }
        for prompt in dict.fromkeys(prompts):
            if prompt in validation:
                record = reader.tensors(*validation[prompt])
            elif key := cache.find_prompt(prompt):
                record = cache.embeddings(key)
            else:
                self.unknown.append(prompt)
                continue
            self._embeds[prompt] = record_embeds(record), record["pooled_embeds"]

    def check(self, max_sequence_length: int, transformer: Mapping[str, Any]) -> None:
        """Check that the embeddings fit a ControlNet and a base model.

        Args:
            max_sequence_length: T5 tokens that the ControlNet was trained with.
            transformer: configuration of the base's transformer.

        Raises:
            ConfigError: the length or a width differs; the message gives both values.
        """
        for name, width in (
            ("joint_attention_dim", self._spec.t5_width),
            ("pooled_projection_dim", self._spec.pooled_width),
        ):
            if transformer.get(name) != width:
                raise ConfigError(
                    f"--cache: made with other text encoders than the base's: {name} of the base "
                    f"{transformer.get(name)}, of the cache {width}."
                )
        if max_sequence_length != self.max_sequence_length:
            raise ConfigError(
                f"--cache: its prompts have {self.max_sequence_length} T5 tokens, and the "
                f"ControlNet wants {max_sequence_length}; leave --cache out, or give "
                f"--max-sequence-length {self.max_sequence_length}."
            )

    def arguments(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        """Return the pipeline's arguments that replace its prompts.

        Args:
            prompts: the batch's prompts.
            negative_prompts: the batch's negative prompts; None without guidance.
            device: device that the pipeline computes on.
            dtype: number format that the pipeline computes in.
        """
        embeds, pooled = self._stack(prompts, device, dtype)
        arguments = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if negative_prompts is not None:
            embeds, pooled = self._stack(negative_prompts, device, dtype)
            arguments |= {
                "negative_prompt_embeds": embeds,
                "negative_pooled_prompt_embeds": pooled,
            }
        return arguments

    def _stack(
        self, prompts: Sequence[str], device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        embeds, pooled = zip(*(self._embeds[prompt] for prompt in prompts), strict=True)
        return torch.stack(embeds).to(device, dtype), torch.stack(pooled).to(device, dtype)
