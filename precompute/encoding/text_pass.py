"""The text pass: unfinished text shards through the text encoders."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from common.interruption import Check
from precompute.encoding.batch_size import BatchSize, find_batch_size
from precompute.encoding.pipeline import Batch, Encoded, EncoderClock, encode_ahead, in_order
from precompute.encoding.shard_build import prepare_work, write_work
from precompute.encoding.text_encoders import LongPrompts, TextEncoders, Tokens, require_finite
from precompute.planning.job import Job
from shards.format.records import Record

USUAL_BATCH = 32


class Prompts(NamedTuple):
    """The prompts of a batch that are to be encoded, by position, and the tokens of all of it."""

    prompts: dict[int, str]
    tokens: Tokens | None


def text_pass(job: Job, check: Check, busy: EncoderClock) -> dict[str, dict[str, Tensor]]:
    """Write the unfinished text shards; return the embeddings of the validation prompts.

    The encoders live in this function alone, so that they are gone when it returns.

    Args:
        job: what is to be made.
        check: called after each shard; may end the run.
        busy: counts the time spent encoding.
    """
    todo = job.todo(job.text)
    pairs = [pair for shard in job.todo(job.validation) for pair in job.pairs_of(shard)]
    if not todo and not pairs:
        return {}
    config = job.config
    encoders = TextEncoders(job.base, job.text_settings, job.device, config.variant)
    size = find_batch_size(
        config.text_batch_size,
        USUAL_BATCH,
        job.device,
        lambda count: encoders.encode(encoders.tokenize([""] * count), BatchSize(count)),
    )
    long_prompts = LongPrompts()

    def load(batch: Batch) -> Prompts:
        items = batch.work.plan.items
        prompts = {at: job.prompt(int(items[at])) for at in batch.wanted}
        if not prompts:
            return Prompts(prompts, None)
        whole = [""] * batch.size
        for at, place in batch.wanted.items():
            whole[place] = prompts[at]
        return Prompts(prompts, encoders.tokenize(whole))

    def records(found: Encoded[Prompts]) -> Iterator[Record]:
        tensors = found.tensors.wait() if found.tensors else {}
        for at, place in found.batch.wanted.items():
            one = {name: tensor[place] for name, tensor in tensors.items()}
            prompt = found.loaded.prompts[at]
            require_finite(one, prompt)
            if found.loaded.tokens:
                long_prompts.add(found.loaded.tokens.t5_lengths[place], config.max_sequence_length)
            yield Record(found.batch.work.keys[at], one, {"prompt": prompt})

    works = (
        prepare_work(job.text, shard, lambda item: {"prompt": job.prompt(item)}) for shard in todo
    )
    total = sum(len(job.text.shard(shard).items) for shard in todo)
    with tqdm(total=total, unit="prompt", desc="text", disable=job.quiet) as bar:
        for work, encoded in encode_ahead(
            works,
            load,
            lambda loaded: encoders.encode(loaded.tokens, size) if loaded.tokens else None,
            batch_size=size,
            num_threads=1,  # tokenizers are not for two threads at once
            busy=busy,
        ):
            write_work(work, in_order(encoded, records, bar))
            check()
    if long_prompts.count:
        job.say(
            f"  {long_prompts.count} prompts have more T5 tokens than --max-sequence-length "
            f"{config.max_sequence_length} and were cut; the longest has {long_prompts.most_tokens}"
        )
    embeds: dict[str, dict[str, Tensor]] = {}
    for pair in pairs:
        found = encoders.encode(encoders.tokenize([pair.prompt]), size).wait()
        one = {name: tensor[0] for name, tensor in found.items()}
        require_finite(one, pair.prompt)
        embeds[pair.prompt] = one
    return embeds
