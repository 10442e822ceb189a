"""What a cache, and then a ControlNet, says of the annotator that drew its conditioning images."""

from pathlib import Path
from typing import Any

from precompute.fingerprints.digest_cache import DigestCache
from precompute.fingerprints.fingerprint import annotator_identity
from sd3.annotators.annotator import Annotator
from shards.format.json_files import digest
from shards.format.specs import AnnotatorSpec


def annotator_spec(annotator: Annotator, digests: DigestCache) -> AnnotatorSpec:
    """Return name, arguments and digest of an annotator; of absolute paths their last part."""
    return AnnotatorSpec(
        name=_published(annotator.name),
        arguments={key: _published(value) for key, value in annotator.arguments.items()},
        digest=digest(annotator_identity(annotator, digests)),
    )


def _published(value: Any) -> Any:
    """Return a value without the folders of this machine: caches and ControlNets are published."""
    if isinstance(value, list):
        return [_published(one) for one in value]
    if isinstance(value, str) and Path(value).is_absolute():
        here = Path.cwd()
        path = Path(value)
        return str(path.relative_to(here)) if path.is_relative_to(here) else path.name
    return value if isinstance(value, bool | int | float | str | list | dict) else repr(value)
