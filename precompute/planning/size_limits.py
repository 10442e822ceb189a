"""How many shards a manifest can list, and how many records a sidecar."""

import math

from common.errors import ConfigError
from precompute.config import PrecomputeConfig
from precompute.planning.context import Products
from precompute.planning.inventory import Inventory
from precompute.planning.views.listing import Views
from shards.format import seal
from shards.format.json_files import LARGEST_FILE_BYTES
from shards.format.manifest import conditioning_folder, validation_folder
from shards.format.product import MOST_SHARDS
from shards.format.sidecar import SIDECAR_BYTES_A_PROMPT, SIDECAR_BYTES_A_RECORD


def refuse_too_large_files(
    config: PrecomputeConfig, products: Products, inventory: Inventory, views: Views
) -> None:
    """Refuse, before anything is encoded, what readers would refuse: too large JSON files.

    Raises:
        ConfigError: there are too many shards for a manifest, or records for a sidecar.
    """
    plans = (products.text, products.latents, products.conditioning, products.validation)
    name = config.conditioning_name
    own = {"text", "latents", conditioning_folder(name), validation_folder(name)}
    num_shards = sum(plan.num_shards for plan in plans)
    if before := seal.previous_manifest(config.cache):
        num_shards += sum(p.num_shards for folder, p in before.products() if folder not in own)
    if num_shards > MOST_SHARDS:
        enough = math.ceil(1.1 * config.shard_mb * num_shards / MOST_SHARDS * 100) / 100
        raise ConfigError(
            f"--shard-mb {config.shard_mb:g}: makes {num_shards} shards, and a manifest lists "
            f"{MOST_SHARDS} at most; give --shard-mb {enough:g} or more."
        )
    latents = products.latents
    for shard in range(latents.num_shards):
        rows = views.rows[latents.shard(shard).items]
        captions = int((inventory.caption_ends[rows + 1] - inventory.caption_ends[rows]).sum())
        size = len(rows) * SIDECAR_BYTES_A_RECORD + captions * SIDECAR_BYTES_A_PROMPT
        if size > LARGEST_FILE_BYTES:
            raise ConfigError(
                f"--shard-mb {config.shard_mb:g}: makes a shard of {len(rows)} records with "
                f"{captions} captions, and its sidecar has {LARGEST_FILE_BYTES >> 20} MiB at most; "
                "give less."
            )
