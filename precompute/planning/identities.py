"""What records of each product depend on, in the form that the cache at hand knows it."""

from precompute.config import PrecomputeConfig
from precompute.fingerprints.digest_cache import DigestCache
from precompute.fingerprints.encoder_spec import (
    EncoderSpecs,
    Identity,
    latent_identity,
    text_identity,
)
from precompute.fingerprints.fingerprint import annotator_identity
from precompute.planning.existing_layout import identities_in_use
from precompute.sources.annotators import FoundAnnotator
from shards.format.manifest import conditioning_folder


def find_identities(
    config: PrecomputeConfig,
    specs: EncoderSpecs,
    drawn_by: FoundAnnotator | None,
    digests: DigestCache,
) -> list[Identity]:
    """Return the identities of text, latents and conditioning."""
    text, text_formerly = (
        text_identity(specs.base, config.variant, specs.text_settings, digests, former=former)
        for former in (False, True)
    )
    latents, latents_formerly = (
        latent_identity(specs.base, config.variant, specs.latent_settings, digests, former=former)
        for former in (False, True)
    )
    drawing = annotator_identity(drawn_by, digests) if drawn_by else []
    # What former versions did not know of may have changed since they made a cache.
    is_known = drawn_by is not None and len(drawing) == len(drawn_by.former)
    control, control_formerly = (
        {**images, "conditioning_range": config.conditioning_range, "drawn_by": by}
        for images, by in (
            (latents, drawing),
            (latents_formerly, drawn_by.former if drawn_by and is_known else drawing),
        )
    )
    forms = {
        "text": (text, text_formerly),
        "latents": (latents, latents_formerly),
        conditioning_folder(config.conditioning_name): (control, control_formerly),
    }
    return identities_in_use(config.cache, forms)
