"""Reading images and conditioning images again, and fitting them for the VAE."""

from PIL import Image, ImageOps
from xxhash import xxh3_128_digest

from common.errors import ShardError
from precompute.planning.context import Context
from precompute.planning.inventory import digest_hex
from precompute.sources.source import Kind
from sd3 import images
from sd3.images import BadImage


def load_image(context: Context, item: int, size_px: tuple[int, int], kind: Kind) -> Image.Image:
    """Return an image or a conditioning image, as it is to be encoded.

    Raises:
        BadImage: the image cannot be decoded, or the conditioning image has another shape.
        ShardError: the file has changed, or cannot be read any more.
    """
    row = context.row_of(item)
    draws_conditioning = kind == "conditioning_image" and context.annotator is not None
    if kind == "image" or draws_conditioning:
        picture = images.fit(_decode(context, row, "image"), size_px)
    else:
        picture = _fit_conditioning_image(context, row, size_px)
    if context.is_mirrored(item):
        picture = ImageOps.mirror(picture)
    if draws_conditioning and context.annotator is not None:
        picture = images.annotated(picture, context.annotator)
    return picture


def _fit_conditioning_image(context: Context, row: int, size_px: tuple[int, int]) -> Image.Image:
    control = _decode(context, row, "conditioning_image")
    image_size = images.size(_read_again(context, row, "image"))
    try:
        return images.fit(control, size_px, image_size)
    except BadImage as error:
        raise BadImage(f"{context.file_name(row, 'conditioning_image')}: {error}") from error


def _decode(context: Context, row: int, kind: Kind) -> Image.Image:
    try:
        return images.decode(_read_again(context, row, kind), context.config.background)
    except BadImage as error:
        raise BadImage(f"{context.file_name(row, kind)}: {error}") from error


def _read_again(context: Context, row: int, kind: Kind) -> bytes:
    """Return the bytes of an image, which the inventory has read before.

    Raises:
        ShardError: they cannot be read now, or have changed. The shard's fingerprint promises the
            planned bytes, so no others may go into it.
    """
    name = context.file_name(row, kind)
    try:
        data = context.source.read(int(context.inventory.rows[row]), kind)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ShardError(
            f"{name} could be read when the run was planned and cannot now "
            f"({reason}); run again, finished shards are kept"
        ) from error
    inventory = context.inventory
    planned = inventory.images if kind == "image" else inventory.conditionings
    if xxh3_128_digest(data).hex() != digest_hex(planned[row]):
        context.digests.forget()
        raise ShardError(
            f"{name} was changed while precompute was running; run again, finished shards are kept"
        )
    return data
