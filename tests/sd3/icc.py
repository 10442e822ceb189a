"""Colour profiles of three primaries and a curve, written by hand. Source: ICC.1:2022."""

import struct

import numpy as np
from numpy.typing import NDArray

# Chromaticities x, y of red, green, blue and of the white D65.
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
D65 = (0.3127, 0.3290)
D50_XYZ = np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def xyz(x: float, y: float) -> NDArray[np.float64]:
    return np.array([x / y, 1, (1 - x - y) / y])


def to_xyz(primaries: tuple[tuple[float, float], ...]) -> NDArray[np.float64]:
    """Return the matrix from linear colours to XYZ, under D65."""
    columns = np.stack([xyz(*primary) for primary in primaries], axis=1)
    return columns * np.linalg.solve(columns, xyz(*D65))


def linear(encoded: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return sRGB's curve, IEC 61966-2-1, which Display P3 shares."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def encoded(light: NDArray[np.float64]) -> NDArray[np.float64]:
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def p3_in_srgb(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return Display P3 pixels in sRGB, 0 to 255, not rounded."""
    light = linear(pixels / 255.0) @ to_xyz(P3).T @ np.linalg.inv(to_xyz(SRGB)).T
    return 255 * encoded(light)


def _fixed(values: NDArray[np.float64]) -> bytes:
    return struct.pack(f">{len(values)}i", *np.rint(values * 65536).astype(int))


def profile(primaries: tuple[tuple[float, float], ...], space: bytes = b"RGB ") -> bytes:
    """Return a version 4 profile with these primaries and sRGB's curve; for b"GRAY" the square."""
    cone = (BRADFORD @ D50_XYZ) / (BRADFORD @ xyz(*D65))
    adapted = np.linalg.inv(BRADFORD) @ np.diag(cone) @ BRADFORD @ to_xyz(primaries)
    curve = b"para\0\0\0\0\0\3\0\0" + _fixed(
        np.array([2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045])
    )
    text = "made by hand".encode("utf-16-be")
    tags = {
        b"desc": b"mluc"
        + struct.pack(">5I", 0, 1, 12, 0x656E5553, len(text))
        + b"\0\0\0\x1c"
        + text,
        b"wtpt": b"XYZ \0\0\0\0" + _fixed(D50_XYZ),
    }
    if space == b"GRAY":
        tags[b"kTRC"] = b"para\0\0\0\0\0\0\0\0" + _fixed(np.array([2.0]))
    else:
        for name, column in zip(b"rgb", adapted.T, strict=True):
            tags[bytes([name]) + b"XYZ"] = b"XYZ \0\0\0\0" + _fixed(column)
            tags[bytes([name]) + b"TRC"] = curve
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">2I", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = start + len(body)
    header = struct.pack(">I4sI", size, b"none", 0x04300000) + b"mntr" + space + b"XYZ "
    header += bytes(12) + b"acsp" + bytes(28) + _fixed(D50_XYZ) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body
