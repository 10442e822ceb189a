"""Prompt embeddings from a cache, so that inference needs no text encoder."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError
from sd3.prompt_embeds import record_embeds
from shards.reading.cache import Cache


class CachedPrompts:
    """Embeddings of prompts that a cache knows.

    Args:
        cache: opened.
        prompts: all that are wanted.
    """

    def __init__(self, cache: Cache, prompts: Iterable[str]) -> None:
        self._spec = cache.manifest.text_spec
        self.max_sequence_length = self._spec.max_sequence_length
        self.unknown: list[str] = []
        self._embeds: dict[str, tuple[Tensor, Tensor]] = {}
        # Records of validation pairs hold embeddings too.
        reader = cache.validation
        validation = {
            str(reader.metadata(*place).get("prompt", "")): place for place in reader.locations()
        }
        for prompt in dict.fromkeys(prompts):
            if prompt in validation:
                record = cache.validation.tensors(*validation[prompt])
            elif key := cache.find_prompt(prompt):
                record = cache.embeddings(key)
            else:
                self.unknown.append(prompt)
                continue
            self._embeds[prompt] = record_embeds(record), record["pooled_embeds"]

    def check(self, max_sequence_length: int, transformer: Mapping[str, Any]) -> None:
        """Refuse a ControlNet that wants prompts of another length, or a base of other widths.

        Args:
            max_sequence_length: that the ControlNet wants.
            transformer: configuration of the base's.

        Raises:
            ConfigError: with what is expected and what the cache has.
        """
        for name, found in (
            ("joint_attention_dim", self._spec.t5_width),
            ("pooled_projection_dim", self._spec.pooled_width),
        ):
            if transformer.get(name) != found:
                raise ConfigError(
                    f"--cache: made with other text encoders than the base's: {name} of the base "
                    f"{transformer.get(name)}, of the cache {found}."
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
        """Return what the pipeline takes in the place of prompts.

        Args:
            prompts: of a batch.
            negative_prompts: likewise; None without guidance.
            device: where the pipeline computes.
            dtype: that it computes in.
        """
        embeds, pooled = self._stacked(prompts, device, dtype)
        found = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if negative_prompts is not None:
            embeds, pooled = self._stacked(negative_prompts, device, dtype)
            found |= {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled}
        return found

    def _stacked(
        self, prompts: Sequence[str], device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        embeds, pooled = zip(*(self._embeds[prompt] for prompt in prompts), strict=True)
        return torch.stack(embeds).to(device, dtype), torch.stack(pooled).to(device, dtype)
