"""`python -m shards info|seal|verify|preview|pull|push`: look into a cache, check it, carry it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from common.device import pick_device
from common.errors import ConfigError
from common.options import CONTEXT, user_errors
from sd3.contact_sheet import save_png
from sd3.pretrained import find_base
from shards import verify
from shards.format import manifest, seal
from shards.format.manifest import DEFAULT_CONDITIONING, Manifest
from shards.format.sidecar import tar_path
from shards.reading.cache import Cache
from shards.remote import transfer
from shards.remote.folder import RemoteFolder, is_url
from shards.remote.streaming import LOCAL_CACHE_GB, open_files
from shards.remote.transfer import Copied

OVERWRITE = click.option(
    "--overwrite", is_flag=True, help="Change a complete cache that is there and is another."
)
LOCAL_CACHE = click.option(
    "--local-cache-dir",
    type=click.Path(path_type=Path),
    help="Where shards of a remote cache are kept; among the user's caches by default.",
)


@click.group(context_settings=CONTEXT)
def main() -> None:
    """Look into a cache, complete it, check it, and copy it from or to a URL."""


@main.command()
@click.argument("cache")
@click.option("--shards", "by_shard", is_flag=True, help="List every shard.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(cache: str, by_shard: bool, as_json: bool) -> None:
    """Say what CACHE, a folder or a URL, holds, what made it and how large it is."""
    with user_errors():
        found = _manifest(cache)
    if as_json:
        click.echo(json.dumps(_summary(found, by_shard), indent=1))
        return
    for folder, product in found.products():
        click.echo(
            f"{folder:28s} {product.num_records:8d} records {product.num_shards:5d} shards "
            f"{product.num_bytes / 1e6:10.1f} MB   {product.fingerprint}"
        )
    text, latent = found.text_spec, found.latent_spec
    click.echo(
        f"text: CLIP [{text.clip_tokens}, {text.clip_width}], T5 [{text.max_sequence_length}, "
        f"{text.t5_width}], pooled [{text.pooled_width}], {text.dtype}"
    )
    about = f"posterior {latent.posterior}, {latent.dtype}"
    for (height, width), images in zip(found.buckets, found.bucket_records(), strict=True):
        count = f", {images} images" if len(found.buckets) > 1 else ""
        click.echo(f"latents: [{latent.latent_channels}, {height}, {width}]{count}, {about}")
    if found.held_out:
        images = sum(found.latents.shard_records[shard] for shard in found.held_out)
        click.echo(f"held out of training: {images} images in {len(found.held_out)} shards")
    for name, spec in found.conditioning_specs.items():
        click.echo(f"conditioning {name!r}: pixels encoded in {spec.pixel_range}")
    click.echo(f"rows skipped: {found.num_skipped}")
    for key, value in found.made_by.items():
        click.echo(f"{key}: {value}")
    if by_shard:
        for row in _shard_table(found):
            click.echo(
                f"{row['shard']:36s} {row['records']:8d} records {row['bytes'] / 1e6:10.1f} MB   "
                f"sha256 {row['sha256']}"
            )


@main.command("seal")
@click.argument("cache", type=click.Path(path_type=Path))
def seal_parts(cache: Path) -> None:
    """Complete CACHE, whose parts were made apart and copied into one folder."""
    with user_errors():
        plan, _ = seal.read_plan(cache)
        found = seal.seal(cache, plan)
    click.echo(f"{cache}: complete, {found.latents.num_records} images")


@main.command("verify")
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def verify_command(ctx: click.Context, cache: str, as_json: bool) -> None:
    """Check every shard and record of CACHE; list all that is wrong, then exit 1."""
    with user_errors():
        folder = _folder(cache)
        found = manifest.load(folder)
    wrong: list[str] = []
    total = verify.num_shards(found) + 1
    with user_errors(), tqdm(total=total, unit="shard", desc="verify", disable=None) as bar:
        for _, faults in verify.faults(folder):
            wrong.extend(faults)
            bar.update()
    if as_json:
        click.echo(json.dumps({"ok": not wrong, "faults": wrong}, indent=1))
    else:
        for line in wrong:
            click.echo(line)
        shards, records = verify.num_shards(found), sum(p.num_records for _, p in found.products())
        verdict = f"{len(wrong)} faults" if wrong else "all good"
        click.echo(f"{cache}: {records} records in {shards} shards checked: {verdict}")
    if wrong:
        ctx.exit(1)


@main.command("preview")
@click.argument("cache")
@click.option(
    "--pretrained-model-name-or-path", "base", required=True, help="Base model; its VAE is read."
)
@click.option("--revision", help="Of the base model on the hub.")
@click.option("--variant", help="Of the base model's weight files, e.g. fp16.")
@click.option("--conditioning-name", default=DEFAULT_CONDITIONING, show_default=True)
@click.option("--num-samples", type=click.IntRange(1), default=8, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the choice.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("preview.png"), show_default=True
)
@click.option("--device", help="Where to decode; the best there is by default.")
@LOCAL_CACHE
def preview_command(
    cache: str,
    base: str,
    revision: str | None,
    variant: str | None,
    conditioning_name: str,
    num_samples: int,
    seed: int,
    output: Path,
    device: str | None,
    local_cache_dir: Path | None,
) -> None:
    """Decode some samples of CACHE, a folder or a URL: image, conditioning image, caption."""
    with user_errors():
        from shards.preview import preview

        found = Cache(open_files(cache, local_cache_dir, LOCAL_CACHE_GB), conditioning_name)
        folder = find_base(base, ("vae",), revision=revision, variant=variant)
        where = pick_device(device)
        sheet = preview(
            found, folder, num_samples=num_samples, seed=seed, device=where, variant=variant
        )
        save_png(output, sheet)
    click.echo(f"{output}: written")


@main.command("pull")
@click.argument("url")
@click.argument("cache")
@OVERWRITE
def pull_command(url: str, cache: str, overwrite: bool) -> None:
    """Copy the cache at URL to the folder CACHE: what is missing, damaged or different."""
    with user_errors():
        done = transfer.pull(RemoteFolder(url), _folder(cache), overwrite=overwrite)
    click.echo(f"{cache}: complete, {_account(done)}")


@main.command("push")
@click.argument("cache")
@click.argument("url")
@OVERWRITE
def push_command(cache: str, url: str, overwrite: bool) -> None:
    """Copy the cache in the folder CACHE to URL: what is missing or different there."""
    with user_errors():
        done = transfer.push(_folder(cache), RemoteFolder(url), overwrite=overwrite)
    click.echo(f"{url}: complete, {_account(done)}")


def _account(done: Copied) -> str:
    return f"{done.copied} shards copied ({done.num_bytes / 1e6:.1f} MB), {done.kept} there already"


def _folder(cache: str) -> Path:
    """Return a cache's folder.

    Raises:
        ConfigError: it is behind a URL.
    """
    if is_url(cache):
        raise ConfigError(
            f"{cache}: this needs a folder of this machine: python -m shards pull {cache} FOLDER."
        )
    return Path(cache)


def _manifest(cache: str) -> Manifest:
    if not is_url(cache):
        return manifest.load(Path(cache))
    data = RemoteFolder(cache).read(manifest.MANIFEST)
    return manifest.from_json(data, f"{cache}/{manifest.MANIFEST}")


def _shard_table(found: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "shard": tar_path(Path(folder), shard).as_posix(),
            "records": product.shard_records[shard],
            "bytes": product.shard_bytes[shard],
            "sha256": product.shard_sha256[shard],
        }
        for folder, product in found.products()
        for shard in range(product.num_shards)
    ]


def _summary(found: Manifest, by_shard: bool) -> dict[str, Any]:
    products = {
        folder: {
            "records": product.num_records,
            "shards": product.num_shards,
            "bytes": product.num_bytes,
            "fingerprint": product.fingerprint,
        }
        for folder, product in found.products()
    }
    return {
        "format_version": found.format_version,
        "products": products,
        "text_spec": dataclasses.asdict(found.text_spec),
        "buckets": [
            {"height": height, "width": width, "images": images}
            for (height, width), images in zip(found.buckets, found.bucket_records(), strict=True)
        ],
        "latent_spec": dataclasses.asdict(found.latent_spec),
        "conditioning_specs": {
            name: dataclasses.asdict(spec) for name, spec in found.conditioning_specs.items()
        },
        "num_skipped": found.num_skipped,
        "made_by": found.made_by,
        **({"shards": _shard_table(found)} if by_shard else {}),
    }


if __name__ == "__main__":
    main(prog_name="python -m shards")
