"""Tokenizers made from the colour names, with one token for every word of the demo's captions."""

import string
from collections import Counter
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, T5TokenizerFast

from demo.colors import COLORS

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def caption_words() -> list[str]:
    """Return the words of which the demo's captions are made, in alphabetical order."""
    names = " ".join(COLORS).split()
    return sorted({*names, "circle", "with", "background"})


def build_clip_tokenizer(max_tokens: int) -> CLIPTokenizer:
    """Return a CLIP tokenizer; a longer prompt is cut to `max_tokens`.

    The byte-pair encoding is computed here because the trainer of `tokenizers` breaks ties at
    random, and the same seed must give the same base model.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(caption_words())
    pieces = [START, END, *letters, *(letter + WORD_END for letter in letters)]
    pieces += [left + right for left, right in merges]
    return CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=merges,
        model_max_length=max_tokens,
    )


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, in order, that make each of the ASCII words one token.

    The most frequent pair is merged first; of equally frequent ones the alphabetically first.
    """
    spellings = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for pieces in spellings for pair in pairwise(pieces)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for pieces in spellings:
            index = 0
            while index < len(pieces) - 1:
                if (pieces[index], pieces[index + 1]) == best:
                    pieces[index : index + 2] = ["".join(best)]
                index += 1
    return merges


def build_t5_tokenizer() -> T5TokenizerFast:
    """Return a T5 tokenizer that also has a token for every letter and digit."""
    # The scores are log probabilities: a whole word is always likelier than its letters.
    words = [(f"▁{word}", -5.0) for word in caption_words()]
    letters = [(letter, -10.0) for letter in ("▁", *string.ascii_letters, *string.digits)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *letters]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)
