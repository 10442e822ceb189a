"""The prompt embedding that SD3 takes, from the parts that a cache stores.

Axes: B samples, T tokens, W embedding width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

CLIP_TOKENS = 77  # of both of SD3's, as the stock pipeline pads prompts


def prompt_embeds(clip_embeds: Tensor, t5_embeds: Tensor) -> Tensor:
    """Return a prompt's embedding: CLIP's, padded with zeros to T5's width, then T5's.

    Args:
        clip_embeds: [B, T_clip, W_clip], W_clip at most W_t5.
        t5_embeds: [B, T_t5, W_t5].

    Returns:
        [B, T_clip + T_t5, W_t5].
    """
    padding = t5_embeds.shape[-1] - clip_embeds.shape[-1]
    return torch.cat([torch.nn.functional.pad(clip_embeds, (0, padding)), t5_embeds], dim=1)


def record_embeds(record: Mapping[str, Tensor]) -> Tensor:
    """Return the embedding of a text record's prompt, [T_clip + T_t5, W_t5]."""
    return prompt_embeds(record["clip_embeds"][None], record["t5_embeds"][None])[0]
