"""Says what lies in the place of a file: a Git-LFS pointer, an error page, a pickle, a file that is cut off.

Every reader of files from outside uses `require_kind` or `file_error`, so a wrong file gives the same sentence
everywhere: what it is, what was wanted, what to do. A kind is recognised by the first bytes, not by the name.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from pathlib import Path
from typing import Literal

Wanted = Literal[
    "safetensors", "torch", "weights", "network", "npz", "json", "recipe", "text", "tar", "parquet", "image"
]

HEAD_BYTES = 4096  # that a kind is recognised by
MAX_SAFETENSORS_HEADER = 100_000_000  # bytes; the library's own limit

_WANTED: dict[Wanted, str] = {
    "safetensors": "a safetensors file",
    "torch": "a torch checkpoint (torch.save of 1.6 or later)",
    "weights": "a file of weights (safetensors or torch.save)",
    "network": "a file of weights",
    "npz": "an .npz file",
    "json": "a JSON file",
    "recipe": "a YAML file",
    "text": "a text file in UTF-8",
    "tar": "an uncompressed tar file",
    "parquet": "a Parquet file",
    "image": "a JPEG, PNG, WebP or BMP image",
}
# The kinds that the reader of a file can go on with.
_ACCEPTED: dict[Wanted, frozenset[str]] = {
    "safetensors": frozenset({"safetensors"}),
    "torch": frozenset({"torch", "zip"}),
    "weights": frozenset({"safetensors", "torch", "zip", "old torch"}),
    # Of any framework: torch-fidelity has extractors of several.
    "network": frozenset({"safetensors", "torch", "zip", "old torch", "pickle", "hdf5", "unknown"}),
    "npz": frozenset({"npz", "zip"}),
    "json": frozenset({"json", "text"}),
    "recipe": frozenset({"text", "json", "empty"}),
    "text": frozenset({"text", "json", "empty"}),
    "tar": frozenset({"tar"}),
    "parquet": frozenset({"parquet"}),
    "image": frozenset({"jpeg", "png", "webp", "bmp"}),
}
_MAGIC = (
    (b"version https://git-lfs.github.com", "lfs"),
    (b"\x93NUMPY", "npy"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "old torch"),
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"BM", "bmp"),
    (b"%!PS", "postscript"),
    (b"%PDF", "pdf"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!", "rar"),
    (b"GGUF", "gguf"),
    (b"(dp", "pickle"),
    (b"(lp", "pickle"),
    (b"ccopy_reg\n", "pickle"),
    (b"cnumpy", "pickle"),
)
_TITLES = {
    "lfs": "a Git-LFS pointer",
    "annex": "a git-annex pointer",
    "npz": "an .npz file of NumPy",
    "npy": "a .npy file, one NumPy array",
    "torch": "a file of torch.save",
    "old torch": "a file of torch.save before PyTorch 1.6",
    "pickle": "a Python pickle",
    "safetensors": "a safetensors file",
    "hdf5": "an HDF5 file",
    "gguf": "a GGUF file",
    "zip": "a zip archive",
    "tar": "a tar file",
    "parquet": "a Parquet file",
    "arrow": "an Arrow file",
    "jpeg": "a JPEG image",
    "png": "a PNG image",
    "webp": "a WebP image",
    "bmp": "a BMP image",
    "gif": "a GIF image",
    "tiff": "a TIFF image",
    "heif": "a HEIF or AVIF image",
    "postscript": "a PostScript file",
    "pdf": "a PDF file",
    "html": "an HTML page",
    "xml": "an XML document",
    "json": "JSON text",
    "text": "a text file",
    "utf16": "a text file in UTF-16",
    "empty": "empty",
    "zeros": "nothing but zero bytes",
    "folder": "a folder",
    "special": "a device, pipe or socket",
    **{name: f"a {name}-compressed file" for name in ("gzip", "bzip2", "xz", "zstd", "7z", "rar")},
}
# Control characters that no text has: all but tab, line ends, form feed and escape.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")
_AGAIN = "download or copy it again"
_ADVICE = {
    "lfs": "fetch the file itself with `git lfs pull`",
    "annex": "fetch the file itself with `git annex get`",
    "html": "such pages stand in the place of a download that failed or needs a login; download it again",
    "xml": "such texts stand in the place of a download that failed; download it again",
    "empty": _AGAIN,
    "zeros": f"a download or copy of it was not finished; {_AGAIN}",
    "folder": "give a file in it",
    "special": "give a file",
    "pickle": "a pickle can run code, so it is not read; load it where you trust it, and save its arrays",
    "old torch": "load it with torch.load where you trust it, and save it again with torch.save",
    "tar": "unpack it first",
    "zip": "unpack it first",
    "utf16": "save it in UTF-8",
    **{name: "unpack it first" for name in ("gzip", "bzip2", "xz", "zstd", "7z", "rar")},
}
_ADVICE_FOR = {
    ("npz", "npy"): "save all arrays in one file, with np.savez(path, mu=..., sigma=...)",
    ("npz", "pickle"): "a pickle can run code, so it is not read; load it where you trust it, and write np.savez(path, "
    "mu=..., sigma=...)",
    ("safetensors", "torch"): "`sfd import` converts official checkpoints",
    ("safetensors", "json"): "if it is the index of weights in several files, merge them into one file",
    ("weights", "json"): "if it is the index of weights in several files, merge them into one file",
    ("torch", "json"): "if it is the index of weights in several files, merge them into one file",
    ("image", "zip"): "an image source reads folders, tar files and Parquet files",
}
_TEXT_KINDS = ("html", "xml", "json", "text")


def require_kind(path: Path, wanted: Wanted) -> str:
    """The kind of a file, such as `safetensors` or `torch`.

    Raises:
        ValueError: the sentence of `file_error`, if the first bytes are of another kind.
    """
    kind, head = _look(path)
    if kind not in _ACCEPTED[wanted]:
        raise ValueError(_sentence(str(path), kind, head, wanted))
    return kind


def file_error(path: Path, wanted: Wanted, cause: object = None) -> str:
    """One sentence about a file that could not be read: what lies there, what was wanted, what to do.

    Args:
        cause: the error of the reader. It is shown if the file is of the wanted kind.
    """
    kind, head = _look(path)
    if kind not in _ACCEPTED[wanted]:
        return _sentence(str(path), kind, head, wanted)
    cut = _cut_off(path, kind)
    if cut is not None:
        return f"{path} is truncated: {cut}; {_AGAIN}"
    return f"{path} is truncated or damaged ({cause}); {_AGAIN}"


def bytes_error(name: str, head: bytes, wanted: Wanted) -> str | None:
    """As `file_error`, for a part of a file, such as a member of an archive; None if it is of the wanted kind."""
    kind = kind_of_bytes(head)
    return None if kind in _ACCEPTED[wanted] else _sentence(name, kind, head, wanted)


def kind_of_bytes(head: bytes) -> str:
    """The kind of a file by its first `HEAD_BYTES` bytes; `unknown` for any other."""
    if not head:
        return "empty"
    # First: the length of its header can have the bytes of another magic number, such as 640 those of a pickle.
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= MAX_SAFETENSORS_HEADER:
        return "safetensors"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _kind_of_zip(head)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp":
        return "heif"
    if head[257:262] == b"ustar":
        return "tar"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if not head.strip(b"\0"):
        return "zeros"
    return _kind_of_text(head)


def _kind_of_zip(head: bytes) -> str:
    """By the name of the first member, so that an archive that is cut off is recognised too."""
    length = int.from_bytes(head[26:28], "little")
    name = head[30 : 30 + length]
    if name.endswith(b".npy"):
        return "npz"
    return "torch" if name.endswith(b"data.pkl") else "zip"


def _kind_of_text(head: bytes) -> str:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf16"
    text = _text(head)
    if text is None:
        return "unknown"
    start = text.lstrip("\ufeff \t\r\n")[:200].lower()
    if start.startswith(("<!doctype html", "<html", "<head", "<body")) or (start[:1] == "<" and "<html" in start):
        return "html"
    if start.startswith(("<?xml", "<error")):
        return "xml"
    if start.startswith("/annex/objects/"):
        return "annex"
    return "json" if start[:1] in ("{", "[") else "text"


def _text(head: bytes) -> str | None:
    """The head as text, without a character that is cut at its end; None if it is no text in UTF-8."""
    for end in range(len(head), max(len(head) - 4, 0), -1):
        try:
            text = head[:end].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return None if _CONTROL.search(text) else text
    return None


def _look(path: Path) -> tuple[str, bytes]:
    """The kind of what is at a path, and its first bytes.

    Raises:
        ValueError: if there is nothing at the path, or it cannot be opened.
    """
    if path.is_dir():
        return "folder", b""
    if not path.exists():
        if path.is_symlink():
            target = path.readlink()
            advice = _ADVICE["annex"] if "annex" in target.parts else "copy the file itself"
            raise ValueError(f"{path} is a link to {target}, which does not exist; {advice}")
        raise ValueError(f"{path}: no such file")
    if not path.is_file():
        return "special", b""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise ValueError(f"{path} cannot be opened: {error.strerror or error}") from error
    return kind_of_bytes(head), head


def _sentence(name: str, kind: str, head: bytes, wanted: Wanted) -> str:
    if kind == "unknown":
        return f"{name} is not {_WANTED[wanted]}: its first bytes are {head[:8].hex(' ')}; {_AGAIN}"
    shown = f" ({_excerpt(head)})" if kind in _TEXT_KINDS else ""
    advice = _ADVICE_FOR.get((wanted, kind)) or _ADVICE.get(kind) or "give another file"
    return f"{name} is {_TITLES[kind]}{shown}, not {_WANTED[wanted]}; {advice}"


def _excerpt(head: bytes, most: int = 80) -> str:
    """The title of a page, or the first words of a text, without control characters."""
    text = _text(head) or ""
    title = re.search(r"<title[^>]*>([^<]+)<", text, re.IGNORECASE)
    words = " ".join((title[1] if title else text).split())
    plain = "".join(sign for sign in words if sign.isprintable())
    return repr(plain if len(plain) <= most else f"{plain[:most]}...")


def _cut_off(path: Path, kind: str) -> str | None:
    """How one sees that a file ends too early; None if one does not."""
    size = path.stat().st_size
    if kind == "safetensors":
        expected = safetensors_size(path)
        return None if expected is None or expected <= size else f"{size:,} of {expected:,} bytes"
    if kind in ("zip", "npz", "torch"):
        try:
            whole = zipfile.is_zipfile(path)
        except zipfile.BadZipFile:  # of a damaged ZIP64 record, by Python before 3.13
            whole = False
        return None if whole else "the list of its contents, at its end, is missing"
    if kind == "parquet":
        with path.open("rb") as file:
            file.seek(max(0, size - 4))
            return None if size >= 12 and file.read(4) == b"PAR1" else "its footer is missing"
    return None


def safetensors_size(path: Path) -> int | None:
    """The size in bytes that the header of a safetensors file says; None if it has no whole header.

    Raises:
        OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > MAX_SAFETENSORS_HEADER:
            return None
        text = file.read(length)
    if len(text) < length:
        return 8 + length
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return 8 + length + int(max(ends, default=0))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
        return None
