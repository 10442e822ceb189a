"""Reading images and conditioning images again, and fitting them for the VAE."""

import threading
from collections.abc import Callable

from PIL import Image, ImageOps
from xxhash import xxh3_128_digest

from common.errors import ShardError
from precompute.encoding.control_values import ControlValues, used_values
from precompute.planning.context import Context
from precompute.planning.inventory import digest_hex
from precompute.planning.views.random_crops import cut
from precompute.sources.patient_read import read_patiently
from precompute.sources.source import Kind
from sd3 import images
from sd3.image_files import BadImage
from sd3.inpainting import without_masked
from sd3.value_scale import AS_IS


class SourceImages:
    """The images of a run's source, as they are encoded.

    Args:
        context: of the run.

    Attributes:
        control_values: what the conditioning images hold that were decoded.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.control_values = ControlValues()
        self._kept = threading.local()  # the image that a thread decoded last, by kind

    def load(self, item: int, size_px: tuple[int, int], kind: Kind) -> Image.Image:
        """Return an image or a conditioning image, as it is to be encoded.

        For inpainting a conditioning image is the image without a part, in RGBA.

        Raises:
            BadImage: the image cannot be decoded, or the conditioning image has another shape.
            ShardError: the file has changed, or cannot be read any more.
            RunError: the source's disk fails again and again.
        """
        draw = self.context.annotator.function if self.context.annotator else None
        inpainting = self.context.config.inpainting
        if kind == "conditioning_image" and draw is None and not inpainting:
            return self._fit_conditioning_image(item, size_px)
        picture = self._picture(item, size_px)
        if kind == "image":
            return picture
        if draw is None:
            control = self._fit_conditioning_image(item, size_px)
        else:
            control = images.annotated(picture, draw)
            self.note_values(item, control, AS_IS)
        return without_masked(picture, control) if inpainting else control

    def _picture(self, item: int, size_px: tuple[int, int]) -> Image.Image:
        image = self._decode_image(self.context.row_of(item))
        return self._view(item, image, size_px, image.size)

    def _view(
        self,
        item: int,
        image: Image.Image,
        size_px: tuple[int, int],
        like: tuple[int, int],
        other_shape: images.OtherShape = "refuse",
    ) -> Image.Image:
        """Return an item's view of its row's image, or of one that lies over it.

        Raises:
            BadImage: the image cannot be laid over the row's.
        """
        if self.context.views.crops[item]:
            box = self.context.crop_of(item)
            if box is None:
                raise BadImage("its image has no size")
            view = cut(image, box, size_px, like, other_shape)
        else:
            view = images.fit(image, size_px, like, other_shape)
        return ImageOps.mirror(view) if self.context.views.mirrored[item] else view

    def _fit_conditioning_image(self, item: int, size_px: tuple[int, int]) -> Image.Image:
        row, config = self.context.row_of(item), self.context.config
        width, height = map(int, self.context.inventory.sizes[row])
        try:
            numbers = self._decoded(
                row,
                "conditioning_image",
                lambda data: images.conditioning_numbers(data, config.background),
            )
            control = images.at_scale(numbers, config.conditioning_scale)
            self.note_values(item, numbers, config.conditioning_scale)
            if not width:
                raise BadImage("its image has no size")
            return self._view(item, control, size_px, (width, height), config.conditioning_fit)
        except BadImage as error:
            name = self.context.file_name(row, "conditioning_image")
            raise BadImage(f"{name}: {error}") from error

    def note_values(self, item: int, numbers: Image.Image, scale: str) -> None:
        """Count what an item's conditioning image holds; each row once."""
        if self.context.views.is_first[item]:
            self.control_values.add(self.context.row_of(item), used_values(numbers, scale))

    def _decode_image(self, row: int) -> Image.Image:
        background = self.context.config.background
        try:
            return self._decoded(row, "image", lambda data: images.decode(data, background))
        except BadImage as error:
            raise BadImage(f"{self.context.file_name(row, 'image')}: {error}") from error

    def _decoded(self, row: int, kind: Kind, decode: Callable[[bytes], Image.Image]) -> Image.Image:
        """Return an image, decoded; once for all of a row's views that come one after the other.

        Nobody may change it.

        Raises:
            BadImage: it cannot be decoded.
            ShardError: see `_read`.
        """
        kept: dict[str, tuple[int, Image.Image]] = self._kept.__dict__
        if kind in kept and kept[kind][0] == row:
            self.context.source.used(int(self.context.inventory.rows[row]), kind)
            return kept[kind][1]
        kept.pop(kind, None)  # before the next one takes memory
        image = decode(self._read(row, kind))
        if self.context.config.images_per_row > 1:
            kept[kind] = row, image
        return image

    def _read(self, row: int, kind: Kind) -> bytes:
        """Return the bytes of an image for one of its uses, as the inventory has read them.

        Raises:
            ShardError: they cannot be read now, or have changed. The shard's fingerprint promises
                the planned bytes, so no others may go into it.
        """
        context, inventory = self.context, self.context.inventory
        name, index = context.file_name(row, kind), int(inventory.rows[row])
        try:
            data = read_patiently(context.source, index, kind)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ShardError(
                f"{name} could be read when the run was planned and cannot now "
                f"({reason}); run again, finished shards are kept"
            ) from error
        planned = inventory.images if kind == "image" else inventory.conditionings
        if xxh3_128_digest(data).hex() != digest_hex(planned[row]):
            # The same version, though other bytes: its digest is wrong. Or it has a new version.
            context.digests.forget(context.source.version(index, kind))
            raise ShardError(
                f"{name} was changed while precompute was running; "
                "run again, finished shards are kept"
            )
        context.source.used(index, kind)
        return data
