"""PNG files of any colour type and bit depth, which Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

SIGNATURE = b"\x89PNG\r\n\x1a\n"
Chunk = tuple[bytes, bytes]


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def write_png(
    path: Path, width: int, height: int, depth: int, colour: int, raw: bytes, extra: Sequence[Chunk] = ()
) -> None:
    """Write rows of packed samples.

    Args:
        colour: the colour type: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA.
        raw: the rows, each of whole bytes.
        extra: chunks between header and pixels, such as (b"tRNS", ...).
    """
    stride = len(raw) // height
    rows = b"".join(b"\0" + raw[at : at + stride] for at in range(0, len(raw), stride))
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    chunks = b"".join(png_chunk(kind, body) for kind, body in extra)
    path.write_bytes(SIGNATURE + head + chunks + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""))
