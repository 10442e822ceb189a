"""Digests of a base model's components, which are part of the fingerprints of records.

Weights are identified by their content, not by their path. So moving or renaming a model, a source
or a cache invalidates nothing.
"""

import json
from pathlib import Path

import xxhash

from precompute.planning.digest_cache import Content, DigestCache
from precompute.sources.file_versions import file_version
from sd3.pretrained import component_variant

CHUNK_BYTES = 1 << 22
# Entries of a config.json that do not change what the model computes.
PROVENANCE_KEYS = {"transformers_version", "torch_dtype", "dtype"}


def hash_bytes(data: bytes) -> str:
    """Return a 128-bit digest of bytes, in hex."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_component(folder: Path, variant: str | None, digests: DigestCache) -> str:
    """Return a digest of a model component: its weights and tokenizer files and its configuration.

    Args:
        folder: of the component, e.g. `<base>/vae`.
        variant: variant of the weight files; files without one are taken where it is missing.
        digests: digests of files that were hashed before; new ones are added.
    """
    digest = xxhash.xxh3_128()
    variant = component_variant(folder, variant)
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            if f".{variant}" in path.name if variant else path.name.count(".") == 1:
                digest.update(b"weights")
                digest.update(_hash_file(path, digests))
        elif path.name == "config.json":
            digest.update(_relevant_config(path))
        elif path.suffix in {".json", ".txt", ".model"} and "index" not in path.name:
            digest.update(path.name.encode())
            digest.update(_hash_file(path, digests))
    return digest.hexdigest()


def _relevant_config(config: Path) -> bytes:
    """Return the entries of a config.json that may change what the model computes, as JSON."""
    values = json.loads(config.read_text(encoding="utf-8"))
    kept = {
        key: value
        for key, value in values.items()
        if not key.startswith("_") and key not in PROVENANCE_KEYS
    }
    return json.dumps(kept, sort_keys=True).encode()


def _hash_file(path: Path, digests: DigestCache) -> bytes:
    version = file_version(path.absolute())
    (known,) = digests.find([version])
    if known is not None:
        return known.digest
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    digests.add(version, Content(digest.digest()))
    return digest.digest()
