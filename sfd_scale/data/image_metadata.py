"""Removes the metadata of PNG, JPEG and WebP files, for images whose metadata is damaged."""

from __future__ import annotations

import struct
import zlib

_PNG, _PNG_KEPT = b"\x89PNG\r\n\x1a\n", (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_JPEG, _START_OF_SCAN = b"\xff\xd8", 0xDA
# Application segments and comments, without APP0 (JFIF) and APP14 (Adobe's colour transform).
_JPEG_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}


def without_metadata(data: bytes) -> bytes | None:
    """The file with its pixels alone: no EXIF, ICC, XMP, text, transparency of PNG, or alpha of WebP.

    Returns:
        None for other formats. A file that ends early, ends early in the result too.
    """
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(_JPEG):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    return None


def _png(data: bytes) -> bytes:
    out, at = [_PNG], len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        chunk = data[at:end]
        # EXIF data has the orientation. It stays if it is whole.
        whole = end <= len(data) and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if chunk[4:8] in _PNG_KEPT or (chunk[4:8] == b"eXIf" and whole):
            out.append(chunk)
        at = end
    return b"".join(out)


def _jpeg(data: bytes) -> bytes:
    out, at = [_JPEG], len(_JPEG)
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _START_OF_SCAN:
        if data[at + 1] == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] not in _JPEG_METADATA:
            out.append(data[at:end])
        at = end
    return b"".join([*out, data[at:]])


def _webp(data: bytes) -> bytes | None:
    at = 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        if kind in (b"VP8 ", b"VP8L"):
            chunk = data[at:end]
            return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk
        at = end
    return None
