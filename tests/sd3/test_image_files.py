"""What a file's header tells, before anything is decoded."""

import io
import sys
import zlib
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from sd3.image_files import FLOATS, BadImage, opened, read_header
from sd3.images import decode, decode_conditioning
from tests.conftest import run_python

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def noise(side: int = 64) -> Image.Image:
    return Image.effect_noise((side, side), 50)


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((4, 4), np.float32))
    return file.getvalue()


FLOAT_TIFF = encoded(Image.fromarray(np.eye(4, dtype=np.float32)), "TIFF")
FLOAT_PFM = b"Pf\n2 2\n-1.0\n" + np.array([0, 1, 2, 4], "<f4").tobytes()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (LFS, "git lfs pull"),
        (array(), "it is a NumPy array"),
        (b"PF\n2 2\n-1.0\n" + bytes(48), "floating point colours"),
        (b"\x76\x2f\x31\x01" + bytes(60), "OpenEXR"),
        (FLOAT_TIFF, FLOATS),
        (FLOAT_PFM, FLOATS),
        (HEIC, "pip install pillow-heif"),
        (b"<html></html>", "cannot identify"),
        (encoded(noise(), "PNG")[:-400], "truncated"),
        (encoded(noise(), "JPEG")[:-400], "truncated"),
        (encoded(noise(), "GIF")[:-400], "truncated"),
        (encoded(noise(), "WEBP", lossless=True)[:-400], "not a readable image"),
    ],
)
def test_what_cannot_be_decoded_is_known_by_its_header(data: bytes, reason: str) -> None:
    assert reason in read_header(data).fault
    with pytest.raises(BadImage, match=reason.replace("(", r"\(")[:40]):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("tail", [b"", b"\0" * 100, b"a film behind the photograph"])
def test_whole_pictures_with_or_without_more_behind_them_are_good(kind: str, tail: bytes) -> None:
    assert read_header(encoded(noise(), kind) + tail) == (64, 64, False, False, "")


def test_a_picture_that_lacks_only_its_end_is_decoded_and_good() -> None:
    data = encoded(noise(), "GIF")[:-1]
    decode(data)
    assert not read_header(data).fault


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
@pytest.mark.parametrize("num_missing", [1, 2, 4, 12, 40])
def test_the_header_says_of_a_cut_picture_what_decoding_does(kind: str, num_missing: int) -> None:
    data = encoded(noise(), kind)[:-num_missing]
    fault = ""
    try:
        decode(data)
    except BadImage as error:
        fault = str(error)
    assert read_header(data).fault == fault


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG."""
    checksum = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + checksum


def test_a_png_is_measured_without_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise().resize((64, 32)), "PNG")
    monkeypatch.setattr(PngImageFile, "load", None)
    assert read_header(data) == (64, 32, False, False, "")


@pytest.mark.parametrize("kind", ["eXIf", "zTXt", "iTXt"])
@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_png_is_upright_wherever_its_orientation_stands(kind: str, place: str) -> None:
    data = encoded(noise().resize((64, 32)), "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind == "eXIf":
        content = exif.tobytes()[6:]  # without b"Exif\0\0"
    elif kind == "zTXt":  # as ImageMagick writes it
        raw = exif.tobytes()
        text = f"\nexif\n{len(raw):8}\n{raw.hex()}\n".encode()
        content = b"Raw profile type exif\0\0" + zlib.compress(text)
    else:
        xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
        content = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
    at = 33 if place == "before" else len(data) - 12  # behind IHDR, or before IEND
    turned = data[:at] + chunk(kind.encode(), content) + data[at:]
    assert decode(turned).size == (32, 64)
    assert read_header(turned) == (32, 64, False, False, "")


@pytest.mark.parametrize("data", [FLOAT_TIFF, FLOAT_PFM])
def test_floats_can_be_used_with_a_scale(data: bytes) -> None:
    assert not read_header(data, takes_floats=True).fault
    decode_conditioning(data, scale="auto")


def test_heic_is_read_where_the_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("pillow_heif")
    asked: list[bool] = []
    package.register_heif_opener = lambda: asked.append(True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    with pytest.raises(BadImage, match="not a readable image"), opened(HEIC):
        pass
    assert asked == [True]


def test_a_hundred_megapixels_are_read_without_a_word() -> None:
    script = """
import io
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from sd3.images import decode
from sd3.image_files import read_header
file = io.BytesIO()
Image.new("1", (10_000, 10_000)).save(file, "PNG")
print(read_header(file.getvalue()), decode(file.getvalue()).size)
"""
    done = run_python("-W", "error", "-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("fault='') (10000, 10000)\n")


def test_above_pillows_limit_a_picture_is_bad() -> None:
    header = bytearray(encoded(noise(), "PNG"))
    header[16:24] = (20_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    fault = read_header(bytes(header)).fault
    assert fault == "not a readable image (more than 179 million pixels; scale it down)"
