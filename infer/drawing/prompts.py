"""Prompt embeddings: from a cache, without text encoders; or encoded once for all ControlNets."""

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
        with_t5: whether T5's embedding is used; zeros take its place otherwise.

    Attributes:
        unknown: prompts that the cache does not hold.
        max_sequence_length: T5 tokens of the embeddings.
    """

    def __init__(self, cache: Cache, prompts: Iterable[str], *, with_t5: bool = True) -> None:
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
                record = cache.pair(*validation[prompt])
            elif key := cache.find_prompt(prompt):
                record = cache.embeddings(key)
            else:
                self.unknown.append(prompt)
                continue
            if not with_t5:
                record["t5_embeds"] = torch.zeros_like(record["t5_embeds"])
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
        pipeline: Any,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        max_sequence_length: int,
    ) -> dict[str, Any]:
        """Return the pipeline's arguments that replace its prompts.

        Args:
            pipeline: stock pipeline.
            prompts: the batch's prompts.
            negative_prompts: the batch's negative prompts; None without guidance.
            max_sequence_length: T5 tokens, as `check` has compared them.
        """
        assert max_sequence_length == self.max_sequence_length
        device, dtype = pipeline._execution_device, pipeline.transformer.dtype

        def stack(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
            embeds, pooled = zip(*(self._embeds[text] for text in texts), strict=True)
            return torch.stack(embeds).to(device, dtype), torch.stack(pooled).to(device, dtype)

        return _arguments(stack(prompts), stack(negative_prompts) if negative_prompts else None)


class EncodedPrompts:
    """Embeddings that a pipeline's text encoders make, of each batch of texts once.

    They are kept in host memory, so that the next ControlNet finds them: 1.3 MB a text in 16 bit.
    """

    def __init__(self) -> None:
        self._encoded: dict[tuple[int, tuple[str, ...]], tuple[Tensor, Tensor]] = {}

    def arguments(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        max_sequence_length: int,
    ) -> dict[str, Any]:
        """Return the pipeline's arguments that replace its prompts, the same to the bit.

        Args:
            pipeline: stock pipeline, with text encoders.
            prompts: the batch's prompts. They are encoded together, as the pipeline does it: an
                embedding depends a little on what is encoded with it.
            negative_prompts: the batch's negative prompts; None without guidance.
            max_sequence_length: T5 tokens.
        """

        def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
            key = max_sequence_length, tuple(texts)
            if key not in self._encoded:
                self._encoded[key] = _encode(pipeline, list(texts), max_sequence_length)
            embeds, pooled = self._encoded[key]
            return embeds.to(pipeline._execution_device), pooled.to(pipeline._execution_device)

        return _arguments(encode(prompts), encode(negative_prompts) if negative_prompts else None)


@torch.no_grad()
def _encode(pipeline: Any, texts: list[str], max_sequence_length: int) -> tuple[Tensor, Tensor]:
    """Return a batch's embeddings and pooled embeddings, in host memory."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        texts,
        None,
        None,
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
    )
    return embeds.cpu(), pooled.cpu()


def _arguments(
    positive: tuple[Tensor, Tensor], negative: tuple[Tensor, Tensor] | None
) -> dict[str, Any]:
    arguments = {"prompt_embeds": positive[0], "pooled_prompt_embeds": positive[1]}
    if negative is not None:
        arguments |= {
            "negative_prompt_embeds": negative[0],
            "negative_pooled_prompt_embeds": negative[1],
        }
    return arguments
