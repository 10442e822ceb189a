"""`--offload auto`: whether the text encoders fit the device whole."""

from collections.abc import Mapping
from dataclasses import replace

from common.device import free_gpu_bytes
from common.memory.need import GB, Need
from precompute.config import PrecomputeConfig
from precompute.encoding.text_pass import USUAL_BATCH
from precompute.memory.simulation import Offload, Peak, read_sizes, text_peaks
from precompute.planning.context import Context


def choose_offload(context: Context) -> Context:
    """Return the run with `none` or `groups` for `--offload`; say so where it is `groups`.

    On other devices than a GPU, which share their memory with the host, nothing is gained by
    groups; and nothing is computed where no prompt is to be encoded.
    """
    config, products = context.config, context.products
    if config.offload != "auto":
        return context
    chosen: Offload = "none"
    if context.device.type == "cuda" and any(
        context.shards_to_build(product) for product in (products.text, products.validation)
    ):
        free = free_gpu_bytes(str(context.device))
        assert free is not None
        settings = context.specs.text_settings
        with_t5 = settings.width_without_t5 is None
        sizes = read_sizes(context.specs.base, with_t5=with_t5)
        peaks = text_peaks(sizes, settings, text_batch(config))
        chosen = fitting_offload(peaks, free)
        if chosen == "groups":
            needed = Need(peaks["none"].total).free
            context.print(
                f"  --offload groups: the text encoders need {needed / GB:.1f} GB whole, and "
                f"{free / GB:.1f} GB of {context.device} are free; T5 visits it layer by layer"
            )
    return replace(context, config=replace(config, offload=chosen))


def fitting_offload(peaks: Mapping[Offload, Peak], free: int | None) -> Offload:
    """Return what `auto` chooses.

    Args:
        peaks: of the text pass.
        free: bytes that are free on the device; None for a device of any size.
    """
    fits = free is None or Need(peaks["none"].total).fits(free)
    return "none" if fits else "groups"


def text_batch(config: PrecomputeConfig) -> int:
    """Return how many prompts are encoded at once; the usual number if as many as fit are."""
    return USUAL_BATCH if config.text_batch_size == "auto" else int(config.text_batch_size)
