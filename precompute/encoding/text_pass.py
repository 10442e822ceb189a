"""The text pass: prompts through the text encoders."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from common.interruption import StopCheck
from common.progress import Progress
from precompute.encoding.batch_size import BatchSize, find_batch_size
from precompute.encoding.encoder_clock import EncoderClock
from precompute.encoding.pipeline import Batch, build_shards, finite_items
from precompute.encoding.shard_build import ShardBuild, prepare_build
from precompute.encoding.text_encoders import (
    LongPrompts,
    TextEncoders,
    Tokenizers,
    Tokens,
    require_finite,
)
from precompute.planning.context import Context
from shards.format.records import Record

USUAL_BATCH = 32
PROMPTS_LOOKED_AT = 10_000  # by a dry run
Embeddings = dict[str, Tensor]


class LoadedPrompts(NamedTuple):
    """The prompts of a batch by position, and the tokens of the whole batch; None without prompts.

    Slots of the batch that are not encoded have the tokens of the empty prompt.
    """

    prompts: dict[int, str]
    tokens: Tokens | None


class CutPrompts:
    """The prompts that CLIP cuts, and those that T5 cuts.

    Args:
        tokenizers: of both.
    """

    def __init__(self, tokenizers: Tokenizers) -> None:
        self.by_clip = LongPrompts("CLIP tokens than its", tokenizers.clip_length)
        self.by_t5 = LongPrompts(
            "T5 tokens than --max-sequence-length", tokenizers.max_sequence_length
        )

    def add(self, prompt: str, clip_length: int, t5_length: int) -> None:
        """Count a prompt if one of them cuts it.

        Args:
            prompt: the prompt.
            clip_length: how many CLIP tokens it has.
            t5_length: how many T5 tokens it has.
        """
        self.by_clip.add(prompt, clip_length)
        self.by_t5.add(prompt, t5_length)

    def describe(self) -> list[str]:
        """Return a line for each encoder that cuts prompts."""
        return [*self.by_clip.describe(), *self.by_t5.describe()]


def look_at_prompts(context: Context) -> list[str]:
    """Return a line for each encoder that cuts prompts; of very many, some are looked at."""
    count = len(context.prompts)
    if not context.shards_to_build(context.products.text):
        return []
    step = -(-count // PROMPTS_LOOKED_AT)
    settings = context.specs.text_settings
    tokenizers = Tokenizers(
        context.specs.base,
        settings.max_sequence_length,
        with_t5=settings.width_without_t5 is None,
    )
    cut = CutPrompts(tokenizers)
    for start in range(0, count, step * USUAL_BATCH):
        items = range(start, min(count, start + step * USUAL_BATCH), step)
        prompts = [context.prompt(item) for item in items]
        for found in zip(prompts, *tokenizers.lengths(prompts), strict=True):
            cut.add(*found)
    of = f"of {-(-count // step)} looked at, " if step > 1 else ""
    return [f"{of}{line}" for line in cut.describe()]


class TextPass:
    """How text records are made: an `EncodingPass`.

    Args:
        context: of the run.
    """

    name = "text"
    num_loaders = 1  # two threads must not use a tokenizer at once

    def __init__(self, context: Context) -> None:
        config, specs = context.config, context.specs
        self.context = context
        self.device = context.device
        self.encoders = TextEncoders.load(
            specs.base,
            specs.text_settings,
            context.device,
            config.variant,
            loras=specs.loras,
            in_groups=config.offload == "groups",
        )
        self.batch_size = find_batch_size(
            config.text_batch_size,
            USUAL_BATCH,
            context.device,
            self._encode_empty_prompts,
            most=len(context.prompts),
        )
        self.cut = CutPrompts(self.encoders.tokenizers)

    def _encode_empty_prompts(self, count: int) -> object:
        return self.encoders.encode(
            self.encoders.tokenize([""] * count), BatchSize(count, may_shrink=False)
        )

    def prepare(self, shard: int) -> ShardBuild:
        """Return the build of a shard."""
        text = self.context.products.text
        return prepare_build(text, shard, lambda item: {"prompt": self.context.prompt(item)})

    def load(self, batch: Batch) -> LoadedPrompts:
        """Return the tokens of a batch."""
        items = batch.build.plan.items
        prompts = {at: self.context.prompt(int(items[at])) for at in batch.to_encode}
        if not prompts:
            return LoadedPrompts(prompts, None)
        whole = [""] * batch.size
        for position, index in batch.to_encode.items():
            whole[index] = prompts[position]
        return LoadedPrompts(prompts, self.encoders.tokenize(whole))

    def encode(self, loaded: LoadedPrompts) -> Embeddings | None:
        """Return the embeddings of a batch."""
        return self.encoders.encode(loaded.tokens, self.batch_size) if loaded.tokens else None

    def records(
        self, batch: Batch, loaded: LoadedPrompts, tensors: Embeddings, finite: Embeddings
    ) -> Iterator[Record]:
        """Yield the records of a batch.

        Raises:
            ShardError: an embedding is not finite.
        """
        for position, index in batch.to_encode.items():
            embeds = {name: tensor[index] for name, tensor in tensors.items()}
            prompt = loaded.prompts[position]
            require_finite({name: bool(each[index]) for name, each in finite.items()}, prompt)
            if loaded.tokens:
                tokens = loaded.tokens
                self.cut.add(prompt, tokens.clip_lengths[index], tokens.t5_lengths[index])
            yield Record(batch.build.keys[position], embeds, {"prompt": prompt})

    def encode_prompt(self, prompt: str) -> Embeddings:
        """Return the embeddings of one prompt.

        Raises:
            ShardError: an embedding is not finite.
        """
        batch = self.encoders.encode(self.encoders.tokenize([prompt]), self.batch_size)
        finite = finite_items(batch)
        require_finite({name: bool(each[0]) for name, each in finite.items()}, prompt)
        return {name: tensor[0].cpu() for name, tensor in batch.items()}


def encode_text(context: Context, check: StopCheck, clock: EncoderClock) -> dict[str, Embeddings]:
    """Build the missing text shards; return the embeddings of the validation prompts by prompt.

    The encoders are referenced by this function alone, so that they are freed when it returns.

    Args:
        context: of the run.
        check: called between shards; may end the run.
        clock: measures the time spent encoding.
    """
    text, validation = context.products.text, context.products.validation
    shards = context.shards_to_build(text)
    pairs = [
        pair for shard in context.shards_to_build(validation) for pair in context.pairs_of(shard)
    ]
    if not shards and not pairs:
        return {}
    text_pass = TextPass(context)
    total = text.count_records(shards)
    with Progress(total, "prompt", "text", quiet=context.quiet) as bar:
        build_shards(
            text_pass,
            shards,
            bad_rows=context.bad_rows,
            clock=clock,
            check=check,
            advance=bar.update,
        )
    embeds = {pair.prompt: text_pass.encode_prompt(pair.prompt) for pair in pairs}
    for line in [*text_pass.cut.describe(), *text_pass.batch_size.describe("prompts")]:
        context.print(f"  {line}")
    return embeds
