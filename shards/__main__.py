"""`python -m shards info|seal|verify|preview|pull|push`: inspect, check and copy a cache."""

import json
from pathlib import Path

import click
from tqdm import tqdm

from common.command import CONTEXT, Group, user_errors
from common.errors import ConfigError
from shards import info, verify
from shards.format import manifest, seal
from shards.format.expected_cache import PLAN, read_expected
from shards.format.manifest import DEFAULT_CONDITIONING, Manifest
from shards.remote import transfer
from shards.remote.folder import RemoteFolder, is_url
from shards.remote.shard_files import TransferResult
from shards.remote.streaming import LOCAL_CACHE_GB, open_files

OVERWRITE = click.option("--overwrite", is_flag=True, help="Change another cache that is there.")
LOCAL_CACHE = click.option(
    "--local-cache-dir",
    type=click.Path(path_type=Path),
    help="Where shards of a remote cache are kept; among the user's caches by default.",
)


@click.group(cls=Group, context_settings=CONTEXT)
def main() -> None:
    """Look into a cache, complete it, check it, and copy it from or to a URL."""


@main.command("info")
@click.argument("cache")
@click.option("--shards", "by_shard", is_flag=True, help="List every shard.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info_command(cache: str, by_shard: bool, as_json: bool) -> None:
    """Say what CACHE, a folder or a URL, holds, what made it and how large it is."""
    with user_errors():
        found = _load_manifest(cache)
    if as_json:
        click.echo(json.dumps(info.summary(found, by_shard=by_shard), indent=1))
        return
    for line in info.describe(found, by_shard=by_shard):
        click.echo(line)


@main.command("seal")
@click.argument("cache", type=click.Path(path_type=Path))
def seal_command(cache: Path) -> None:
    """Complete CACHE: its parts, made apart, are in one folder, or a former version made it."""
    with user_errors():
        if (cache / PLAN).is_file() or not (cache / manifest.MANIFEST).is_file():
            expected, _ = read_expected(cache)
            seal.seal(cache, expected)
            names = [expected.conditioning_name]
        else:  # it was pulled, and so is complete
            names = [*manifest.load(cache).conditioning]
        sealed = seal.complete(cache)
    pairs = ", ".join(info.num_pairs(sealed, name) for name in names)
    click.echo(f"{cache}: complete, {pairs}, {sealed.num_skipped} rows left out")


@main.command("verify")
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def verify_command(ctx: click.Context, cache: str, as_json: bool) -> None:
    """Check every shard and record of CACHE; list all that is wrong, then exit 1."""
    faults: list[str] = []
    with user_errors():
        folder = _local_folder(cache)
        found = manifest.load(folder)
        with tqdm(total=verify.num_steps(found), unit="shard", desc="verify", disable=None) as bar:
            for _, shard_faults in verify.faults(folder):
                faults.extend(shard_faults)
                bar.update()
    if as_json:
        click.echo(json.dumps({"ok": not faults, "faults": faults}, indent=1))
    else:
        for line in faults:
            click.echo(line)
        records = sum(product.num_records for _, product in found.products())
        verdict = f"{len(faults)} faults" if faults else "all good"
        shards = verify.num_shards(found)
        click.echo(f"{cache}: {records} records in {shards} shards checked: {verdict}")
    if faults:
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
    # The only command that needs torch and diffusers, which take seconds to import.
    from sd3.contact_sheet import save_png
    from shards.preview import preview
    from shards.reading.cache import Cache

    with user_errors():
        opened = Cache(open_files(cache, local_cache_dir, LOCAL_CACHE_GB), conditioning_name)
        sheet = preview(
            opened,
            base,
            num_samples=num_samples,
            seed=seed,
            device=device,
            revision=revision,
            variant=variant,
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
        result = transfer.pull(RemoteFolder(url), _local_folder(cache), overwrite=overwrite)
    click.echo(f"{cache}: complete, {_describe(result)}")


@main.command("push")
@click.argument("cache")
@click.argument("url")
@OVERWRITE
def push_command(cache: str, url: str, overwrite: bool) -> None:
    """Copy the cache in the folder CACHE to URL: what is missing or different there."""
    with user_errors():
        result = transfer.push(_local_folder(cache), RemoteFolder(url), overwrite=overwrite)
    click.echo(f"{url}: complete, {_describe(result)}")


def _describe(result: TransferResult) -> str:
    return (
        f"{result.copied} shards copied ({result.num_bytes / 1e6:.1f} MB), "
        f"{result.unchanged} there already"
    )


def _local_folder(cache: str) -> Path:
    """Return a cache's folder.

    Raises:
        ConfigError: the cache is behind a URL.
    """
    if is_url(cache):
        raise ConfigError(
            f"{cache}: this needs a folder of this machine: python -m shards pull {cache} FOLDER."
        )
    return Path(cache)


def _load_manifest(cache: str) -> Manifest:
    if not is_url(cache):
        return manifest.load(Path(cache))
    data = RemoteFolder(cache).read(manifest.MANIFEST)
    return manifest.from_json(data, f"{cache}/{manifest.MANIFEST}")


if __name__ == "__main__":
    main(prog_name="python -m shards")
