"""The data set card, README.md: with it the hub and `load_dataset` find each product.

Without it `load_dataset` takes the sidecars' JSON for the data. The products have other columns
each, so each is a configuration. Columns are declared, since `datasets` would infer them from five
records and drop in silence what only later records have.

Source: https://huggingface.co/docs/hub/datasets-manual-configuration.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from common.atomic_files import write_text
from common.errors import ShardError
from shards.format.manifest import DEFAULT_CONDITIONING, Manifest

CARD = "README.md"
# What lies between is ours and is written anew; the rest is the user's.
BEGIN, END = "<!-- shards: begin -->", "<!-- shards: end -->"
BLOCK = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
FRONT_MATTER = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)

IMAGE_COLUMNS = {
    "image_hash": {"dtype": "string"},
    "mirrored": {"dtype": "bool"},
    "held_out": {"dtype": "bool"},
    "crop": {"list": "int64"},
    "background": {"list": "int64"},
}
CONDITIONING_COLUMNS = IMAGE_COLUMNS | {
    "conditioning_hash": {"dtype": "string"},
    "fit": {"dtype": "string"},
}
PROMPT_COLUMNS = {"prompt": {"dtype": "string"}}
JSON_COLUMNS: Mapping[str, Mapping[str, Any]] = {
    "text": PROMPT_COLUMNS,
    "latents": IMAGE_COLUMNS,
    "conditioning": CONDITIONING_COLUMNS,
    "validation": PROMPT_COLUMNS,
}


def write(cache: Path, manifest: Manifest) -> None:
    """Write the card of a cache, or bring one up to date; one that is right is not touched.

    Raises:
        ShardError: the card's front matter cannot be read; naming the file.
    """
    path = cache / CARD
    try:
        before = path.read_bytes().decode() if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise ShardError(f"{path}: no UTF-8 ({error}); mend or remove it") from error
    now = updated(before, manifest, path)
    if now != before:
        write_text(path, now)


def updated(before: str, manifest: Manifest, where: object) -> str:
    """Return a card that describes a cache, with what a user wrote into it.

    Args:
        before: the card as it is; empty if there is none.
        manifest: of the cache.
        where: the card's path or address, for the error.

    Returns:
        The card with `configs`, `dataset_info` and the block between the markers as the manifest
        says. Other fields and text stay. A card without the markers is a user's own and stays as
        it is.

    Raises:
        ShardError: the front matter is no YAML, or no mapping.
    """
    block = f"{BEGIN}\n{_body(manifest)}{END}"
    if not before:
        fields = {"license": "unknown", "tags": ["webdataset", "controlnet", "stable-diffusion-3"]}
        return f"{_front_matter(fields | configurations(manifest))}\n# Cache\n\n{block}\n"
    if not BLOCK.search(before):
        return before
    found = FRONT_MATTER.match(before)
    rest = before[found.end() :] if found else before
    fields = _fields(found[1], where) if found else {}
    # As a function: a string's backslashes would be read.
    text = BLOCK.sub(lambda _: block, rest, count=1)
    return _front_matter(fields | configurations(manifest)) + text


def configurations(manifest: Manifest) -> dict[str, Any]:
    """Return the front matter's `configs` and `dataset_info`, for products that have records."""
    configs, info = [], []
    for folder, product in manifest.products():
        if not product.num_records:
            continue
        name = configuration_name(folder)
        files = [{"split": "train", "path": f"{folder}/*.tar"}]
        configs.append({"config_name": name, "data_files": files})
        kind = folder.partition("/")[0]
        columns = [{"name": name, **kind} for name, kind in JSON_COLUMNS[kind].items()]
        features = [
            {"name": "safetensors", "dtype": "binary"},
            {"name": "json", "struct": columns},
            {"name": "__key__", "dtype": "string"},
            {"name": "__url__", "dtype": "string"},
        ]
        info.append({"config_name": name, "features": features})
    return {"configs": configs, "dataset_info": info}


def configuration_name(folder: str) -> str:
    """Return what `load_dataset` calls a product: `depth`'s conditioning `conditioning-depth`.

    The control of the default name has none in it: `conditioning`, `validation`.
    """
    kind, _, name = folder.partition("/")
    return f"{kind}-{name}" if name not in ("", DEFAULT_CONDITIONING) else kind


def _body(manifest: Manifest) -> str:
    rows = [
        f"| `{configuration_name(folder)}` | {product.num_records} | {product.num_shards} "
        f"| {product.num_bytes} | `{product.fingerprint}` |"
        for folder, product in manifest.products()
        if product.num_records
    ]
    held_out = sum(manifest.latents.shard_records[shard] for shard in manifest.held_out)
    note = (
        f"Training leaves out {held_out} images, those whose JSON says `held_out`.\n\n"
        if held_out
        else ""
    )
    return f"""\
Latents and prompt embeddings of Stable Diffusion 3 for the training of a ControlNet, in
WebDataset tars. Each product is a configuration:

    datasets.load_dataset(PATH, "latents", split="train")

and `safetensors.torch.load` gives the tensors of a record's `safetensors` column.

| configuration | records | shards | bytes | fingerprint |
|---|---:|---:|---:|---|
{chr(10).join(rows)}

{note}What stands between the two markers, `configs` and `dataset_info` are written with the cache;
all else in this file is kept.
"""


def _fields(text: str, where: object) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ShardError(f"{where}: its front matter is no YAML ({line}); mend it") from error
    if not isinstance(fields, dict | None):
        raise ShardError(f"{where}: its front matter is no mapping of names to values; mend it")
    return fields or {}


def _front_matter(fields: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True)}---\n"
