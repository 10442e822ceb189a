"""Images and conditioning images, read again and made ready for the VAE."""

from PIL import Image, ImageOps
from xxhash import xxh3_128_digest

from common.errors import ShardError
from precompute.planning.inventory import digest_hex
from precompute.planning.job import Job
from precompute.sources.source import Kind
from sd3 import images
from sd3.images import BadImage


def load_picture(job: Job, item: int, size_px: tuple[int, int], *, controls: bool) -> Image.Image:
    """Return an image, or a conditioning image, as it is to be encoded.

    Raises:
        BadImage: it is none, or its conditioning image is of another shape.
    """
    row = job.row_of(item)
    background = job.config.background

    def decoded(kind: Kind) -> Image.Image:
        try:
            return images.decode(_read_again(job, row, kind), background)
        except BadImage as error:
            raise BadImage(f"{job.file_name(row, kind)}: {error}") from error

    if controls and job.annotator is None:
        control = decoded("conditioning_image")
        like = images.size(_read_again(job, row, "image"))
        try:
            picture = images.fit(control, size_px, like)
        except BadImage as error:
            raise BadImage(f"{job.file_name(row, 'conditioning_image')}: {error}") from error
    else:
        picture = images.fit(decoded("image"), size_px)
    if job.is_mirrored(item):
        picture = ImageOps.mirror(picture)
    if controls and job.annotator is not None:
        picture = images.annotated(picture, job.annotator)
    return picture


def _read_again(job: Job, row: int, kind: Kind) -> bytes:
    """Return the bytes of an image, which the inventory has read before.

    Raises:
        ShardError: they cannot be read now, or are others. The shard's fingerprint vouches for
            what was planned, so nothing else may go into it.
    """
    name = job.file_name(row, kind)
    try:
        data = job.source.read(int(job.inventory.rows[row]), kind)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ShardError(
            f"{name} could be read when the run was planned and cannot now "
            f"({reason}); run again, finished shards are kept"
        ) from error
    planned = job.inventory.images if kind == "image" else job.inventory.conditionings
    if xxh3_128_digest(data).hex() != digest_hex(planned[row]):
        job.remembered.forget()
        raise ShardError(
            f"{name} was changed while precompute was running; run again, finished shards are kept"
        )
    return data
