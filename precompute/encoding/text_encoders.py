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

from common.errors import RunError, ShardError
from common.memory.exhausted import device_remedies, full_memory_line, is_out_of_memory
from precompute.encoding.batch_size import BatchSize, in_parts
from precompute.fingerprints.encoder_spec import CLIP_COMPONENTS, TextSettings
from precompute.memory.layer_groups import bring_in_groups
from precompute.sources.counted import Counted
from sd3.base.lora import Lora, merge_loras
from sd3.base.without_t5 import T5_COMPONENTS
from sd3.pretrained import component_variant

SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Tokens:
    """A batch of prompts, tokenized.

    Attributes:
        clip: ids for each CLIP encoder, [B, T].
        t5: ids for T5, [B, T]; None without it.
        clip_lengths: how many CLIP tokens each prompt has, start and end included, uncut.
        t5_lengths: how many T5 tokens each prompt has, the end token included, uncut; 0 without it.
    """

    clip: list[Tensor]
    t5: Tensor | None
    clip_lengths: list[int]
    t5_lengths: list[int]


class Tokenizers:
    """The tokenizers of the text encoders, without which they need no device.

    Args:
        base: model folder with tokenizers.
        max_sequence_length: T5 tokens a prompt.
        with_t5: whether T5 is used.
        pin_memory: whether tokens are to be copied to a GPU.

    Attributes:
        clip_length: CLIP tokens a prompt.
    """

    def __init__(
        self,
        base: Path,
        max_sequence_length: int,
        *,
        with_t5: bool = True,
        pin_memory: bool = False,
    ) -> None:
        from transformers import CLIPTokenizer, T5TokenizerFast

        self.clips = [
            CLIPTokenizer.from_pretrained(base, subfolder=name) for name, _ in CLIP_COMPONENTS
        ]
        self.t5 = None
        if with_t5:
            self.t5 = T5TokenizerFast.from_pretrained(base, subfolder=T5_COMPONENTS[0])
        self.clip_length: int = self.clips[0].model_max_length
        self.max_sequence_length = max_sequence_length
        self.pin_memory = pin_memory

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Return the tokens of a batch of prompts; must not run in two threads at once."""
        clip_lengths, t5_lengths = self.lengths(prompts)
        return Tokens(
            clip=[self._ids(tokenizer, prompts, self.clip_length) for tokenizer in self.clips],
            t5=self._ids(self.t5, prompts, self.max_sequence_length) if self.t5 else None,
            clip_lengths=clip_lengths,
            t5_lengths=t5_lengths,
        )

    def lengths(self, prompts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return how many tokens of CLIP, and of T5, each prompt has, uncut."""
        of_clips = [_lengths(tokenizer, prompts) for tokenizer in self.clips]
        of_t5 = _lengths(self.t5, prompts) if self.t5 else [0] * len(prompts)
        return [max(each) for each in zip(*of_clips, strict=True)], of_t5

    def _ids(self, tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = tokens.input_ids
        return ids.pin_memory() if self.pin_memory else ids


def _lengths(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    uncut = tokenizer(list(prompts), truncation=False, verbose=False).input_ids
    return [len(ids) for ids in uncut]


class TextEncoders:
    """The two CLIP encoders and T5, or the former alone.

    Args:
        clips: CLIP-L and CLIP-G, on the device.
        t5: on the device, or brought to it in groups of layers; None without it.
        tokenizers: of all three; only `tokenize` needs them.
        settings: token length and number formats.
        device: where they compute.
        in_groups: whether T5's layers visit the device in turn.
    """

    def __init__(
        self,
        clips: Sequence[Any],
        t5: Any,
        tokenizers: Tokenizers | None,
        settings: TextSettings,
        device: torch.device,
        *,
        in_groups: bool = False,
    ) -> None:
        self.clips, self.t5 = clips, t5
        self.in_groups = in_groups
        self._tokenizers = tokenizers
        self.settings = settings
        self.device = device

    @classmethod
    def load(
        cls,
        base: Path,
        settings: TextSettings,
        device: torch.device,
        variant: str | None,
        *,
        loras: Sequence[Lora] = (),
        in_groups: bool = False,
    ) -> "TextEncoders":
        """Return those of a base model.

        Args:
            base: model folder with tokenizers and text encoders.
            settings: token length and number formats.
            device: where they compute.
            variant: variant of the weight files.
            loras: to merge into the CLIP encoders.
            in_groups: whether T5's layers stay in host memory and visit the device in turn.

        Raises:
            ConfigError: a LoRA was made for another model.
            RunError: they do not fit the device's memory.
        """
        from transformers import CLIPTextModelWithProjection, T5EncoderModel

        def load(model_class: Any, name: str, to: torch.device) -> Any:
            model = model_class.from_pretrained(
                base,
                subfolder=name,
                variant=component_variant(base / name, variant),
                dtype=getattr(torch, settings.compute_dtype),
                use_safetensors=True,
                # Load onto the device directly, so that there are never two copies.
                device_map={"": str(to)},
            )
            merge_loras(model, name, loras)
            return model.eval()

        with_t5 = settings.width_without_t5 is None
        tokenizers = Tokenizers(
            base,
            settings.max_sequence_length,
            with_t5=with_t5,
            pin_memory=device.type == "cuda",
        )
        try:
            clips = [load(CLIPTextModelWithProjection, name, device) for _, name in CLIP_COMPONENTS]
            at_rest = torch.device("cpu") if in_groups else device
            t5 = load(T5EncoderModel, T5_COMPONENTS[1], at_rest) if with_t5 else None
            if in_groups and with_t5:
                bring_in_groups(t5, device, rest_stays=True)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            remedies = _remedies(settings, device, in_groups=in_groups)
            raise RunError(full_memory_line("the text encoders", error, remedies)) from error
        return cls(clips, t5, tokenizers, settings, device, in_groups=in_groups)

    @property
    def tokenizers(self) -> Tokenizers:
        """The tokenizers of all three."""
        assert self._tokenizers is not None
        return self._tokenizers

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Return the tokens of a batch of prompts; must not run in two threads at once."""
        return self.tokenizers.tokenize(prompts)

    @torch.no_grad()
    def encode(self, tokens: Tokens, size: BatchSize) -> dict[str, Tensor]:
        """Return the embeddings of prompts, in the cache's number format.

        Args:
            tokens: of the prompts.
            size: how many prompts are encoded at once.

        Returns:
            `clip_embeds` [B, T, W], `t5_embeds` [B, T, W] unless there is no T5, and
            `pooled_embeds` [B, W], on the device.
        """
        inputs = [*tokens.clip, *([] if tokens.t5 is None else [tokens.t5])]
        embeds = in_parts(
            self._embeds,
            inputs,
            size,
            item="prompt",
            remedies=_remedies(self.settings, self.device, in_groups=self.in_groups),
        )
        dtype = getattr(torch, self.settings.cache_dtype)
        return {name: tensor.to(dtype) for name, tensor in embeds.items()}

    def _embeds(self, *tokens: Tensor) -> dict[str, Tensor]:
        hidden, pooled = [], []
        count = len(self.clips)
        for ids, encoder in zip(tokens[:count], self.clips, strict=True):
            output = encoder(ids.to(self.device, non_blocking=True), output_hidden_states=True)
            # SD3 takes the projection of the end token and the last layer but one.
            pooled.append(output[0])
            hidden.append(output.hidden_states[-2])
        embeds = {
            "clip_embeds": torch.cat(hidden, dim=-1),
            "pooled_embeds": torch.cat(pooled, dim=-1),
        }
        if self.t5 is not None:
            embeds["t5_embeds"] = self.t5(tokens[count].to(self.device, non_blocking=True))[0]
        return embeds


def _remedies(settings: TextSettings, device: torch.device, *, in_groups: bool) -> list[str]:
    """Return what lessens the memory that the text encoders take, the best first."""
    on_cpu = device.type == "cpu"
    remedies = [] if in_groups or on_cpu else ["--offload groups"]
    if settings.compute_dtype != "bfloat16":
        remedies.append("--text-dtype bfloat16")
    if in_groups and not on_cpu:
        remedies.append("more free host memory, where T5's layers are")
    return [*remedies, *device_remedies(device)]


class LongPrompts:
    """The prompts that have more tokens than an encoder takes.

    Args:
        tokens: what are counted, in words.
        limit: how many of them are kept.
    """

    def __init__(self, tokens: str, limit: int) -> None:
        self.tokens = tokens
        self.limit = limit
        self.most_tokens = 0
        self.prompts = Counted[str]()

    def add(self, prompt: str, num_tokens: int) -> None:
        """Count a prompt if it has more tokens than the limit."""
        if num_tokens > self.limit:
            self.most_tokens = max(self.most_tokens, num_tokens)
            self.prompts.add([repr(prompt[:SHOWN_CHARACTERS])])

    def describe(self) -> list[str]:
        """Return a line on the prompts, if there are any."""
        if not self.prompts.count:
            return []
        return [
            f"{self.prompts.count} prompts have more {self.tokens} {self.limit} and are cut; the "
            f"longest has {self.most_tokens}: {self.prompts.named()}"
        ]


def require_finite(finite: dict[str, bool], prompt: str) -> None:
    """Raise unless all embeddings of a prompt are finite.

    Args:
        finite: whether each is, by name.
        prompt: the prompt.

    Raises:
        ShardError: naming the prompt and the way out.
    """
    for name, is_finite in finite.items():
        if not is_finite:
            raise ShardError(
                f"{name} of the prompt {prompt[:80]!r} is not finite; half precision can overflow: "
                "run again with --text-dtype float32 or bfloat16, or --cache-dtype float32."
            )
