"""Digests of a base model's components, which are part of the fingerprints of records.

Weights are identified by their content, not by their path. So moving or renaming a model, a source
or a cache invalidates nothing.
"""

import json
from pathlib import Path
from typing import Any

import xxhash

from precompute.fingerprints.digest_cache import Content, DigestCache
from precompute.sources.file_versions import file_version
from sd3.annotators.annotator import Annotator
from sd3.annotators.own_sources import files_below
from sd3.pretrained import component_variant

CHUNK_BYTES = 1 << 22
# Entries of a config.json that do not change what the model computes.
PROVENANCE_KEYS = {"transformers_version", "torch_dtype", "dtype"}


def hash_bytes(data: bytes) -> str:
    """Return a 128-bit digest of bytes, in hex."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_component(
    folder: Path, variant: str | None, digests: DigestCache, *, former: bool = False
) -> str:
    """Return a digest of a model component: its weights and tokenizer files and its configuration.

    Args:
        folder: of the component, e.g. `<base>/vae`.
        variant: variant of the weight files; files without one are taken where it is missing.
        digests: digests of files that were hashed before; new ones are added.
        former: as former versions of this program did: the bytes of a tokenizer's JSON files count,
            not what they say.
    """
    digest = xxhash.xxh3_128()
    variant = component_variant(folder, variant)
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            if f".{variant}" in path.name if variant else path.name.count(".") == 1:
                digest.update(b"weights")
                digest.update(hash_file(path, digests))
        elif path.name == "config.json":
            digest.update(_relevant_config(path))
        elif path.suffix in {".json", ".txt", ".model"} and "index" not in path.name:
            digest.update(path.name.encode())
            said = None if former or path.suffix != ".json" else _json_content(path)
            digest.update(said or hash_file(path, digests))
    return digest.hexdigest()


def annotator_identity(annotator: Annotator, digests: DigestCache) -> list[str]:
    """Return what an annotator's drawings depend on: code, arguments, files and models."""
    files = sorted(hash_file(path, digests).hex() for path in annotator.files)
    folders = sorted(_hash_folder(folder, digests) for folder in annotator.folders)
    models = [hash_component(folder, None, digests) for folder in annotator.models]
    return [*annotator.identity, *files, *folders, *models]


def _hash_folder(folder: Path, digests: DigestCache) -> str:
    """Return a digest of the files below a folder, by their names in it and their bytes."""
    digest = xxhash.xxh3_128()
    for path in files_below(folder):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(hash_file(path, digests))
    return digest.hexdigest()


def _json_content(path: Path) -> bytes | None:
    """Return a digest of what a JSON file says, however it is spaced; None if it is no JSON."""
    try:
        content = _relevant(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError):
        return None
    return xxhash.xxh3_128_digest(json.dumps(content, sort_keys=True).encode())


def _relevant_config(config: Path) -> bytes:
    """Return the entries of a config.json that may change what the model computes, as JSON."""
    values = _relevant(json.loads(config.read_text(encoding="utf-8")))
    return json.dumps(values, sort_keys=True).encode()


def _relevant(values: Any) -> Any:
    """Return the entries of a JSON object that may change what is computed."""
    if not isinstance(values, dict):
        return values
    return {
        key: value
        for key, value in values.items()
        if not key.startswith("_") and key not in PROVENANCE_KEYS
    }


def hash_file(path: Path, digests: DigestCache) -> bytes:
    """Return a digest of a file's bytes, 16 bytes."""
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
