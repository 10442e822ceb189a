"""`python -m shards info|verify`: what is in a cache, and whether it is all there."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from shards import manifest, verify
from shards.manifest import Manifest
from shards.options import CONTEXT, user_errors


@click.group(context_settings=CONTEXT)
def main() -> None:
    """Look into a cache and check it."""


@main.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(cache: Path, as_json: bool) -> None:
    """Say what CACHE holds, what made it and how large it is."""
    with user_errors():
        found = manifest.load(cache)
    if as_json:
        click.echo(json.dumps(_summary(found), indent=1))
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
    click.echo(
        f"latents: [{latent.latent_channels}, {latent.height}, {latent.width}], "
        f"posterior {latent.posterior}, {latent.dtype}"
    )
    for name, spec in found.conditioning_specs.items():
        click.echo(f"conditioning {name!r}: pixels encoded in {spec.pixel_range}")
    click.echo(f"rows skipped: {found.num_skipped}")
    for key, value in found.made_by.items():
        click.echo(f"{key}: {value}")


@main.command("verify")
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def verify_command(ctx: click.Context, cache: Path, as_json: bool) -> None:
    """Check every shard and record of CACHE; list all that is wrong, then exit 1."""
    with user_errors():
        found = manifest.load(cache)
    wrong: list[str] = []
    with tqdm(total=verify.num_shards(found) + 1, unit="shard", desc="verify", disable=None) as bar:
        for _, faults in verify.faults(cache):
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


def _summary(found: Manifest) -> dict[str, Any]:
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
        "latent_spec": dataclasses.asdict(found.latent_spec),
        "conditioning_specs": {
            name: dataclasses.asdict(spec) for name, spec in found.conditioning_specs.items()
        },
        "num_skipped": found.num_skipped,
        "made_by": found.made_by,
    }


if __name__ == "__main__":
    main(prog_name="python -m shards")
