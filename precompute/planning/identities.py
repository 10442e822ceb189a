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
from sd3.annotators.annotator import Annotator
from sd3.value_scale import AS_IS
from shards.format.manifest import conditioning_folder


def find_identities(
    config: PrecomputeConfig,
    specs: EncoderSpecs,
    annotator: Annotator | None,
    digests: DigestCache,
) -> list[Identity]:
    """Return the identities of text, latents and conditioning."""
    text, text_formerly = (
        text_identity(
            specs.base,
            config.variant,
            specs.text_settings,
            digests,
            loras=specs.loras,
            former=former,
        )
        for former in (False, True)
    )
    latents, latents_formerly = (
        latent_identity(specs.base, config.variant, specs.latent_settings, digests, former=former)
        for former in (False, True)
    )
    drawing = annotator_identity(annotator, digests) if annotator else []
    # What former versions did not know of may have changed since they made a cache.
    is_known = annotator is not None and len(drawing) == len(annotator.former)
    # Absent where it changes no pixels, as it was before there was one.
    scale = config.conditioning_scale
    special: Identity = {} if scale == AS_IS else {"conditioning_scale": scale}
    special |= {"inpainting": True} if config.inpainting else {}
    control, control_formerly = (
        {**images, "conditioning_range": config.conditioning_range, "drawn_by": by, **special}
        for images, by in (
            (latents, drawing),
            (latents_formerly, annotator.former if annotator and is_known else drawing),
        )
    )
    forms = {
        "text": (text, text_formerly),
        "latents": (latents, latents_formerly),
        conditioning_folder(config.conditioning_name): (control, control_formerly),
    }
    return identities_in_use(config.cache, forms)
