"""Files of weights: given or downloaded once per machine, verified, and loaded without running code from them."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import time
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse
from urllib.request import urlopen

import torch
from torch import Tensor

from sfd_scale.runtime import distributed
from sfd_scale.runtime.file_kind import require_kind
from sfd_scale.runtime.files import atomically, file_sha256
from sfd_scale.runtime.limits import DOWNLOAD, limit_s

logger = logging.getLogger(__name__)
SILENCE_S = 60.0  # of a server, before its connection is cut
_PIECE = 1 << 20  # bytes


def fetch(path: Path | None, url: str | None, sha256: str | None) -> Path:
    """The file at `path`, or the one at `url` if `path` is None. Its checksum is verified.

    All ranks have to call this; one rank per machine downloads.

    Raises:
        ValueError: for a missing file, a wrong checksum, or a failed download.
    """
    if path is None:
        assert url is not None and sha256 is not None
        path = Path(torch.hub.get_dir()) / "checkpoints" / f"{sha256[:8]}-{PurePosixPath(urlparse(url).path).name}"
        if distributed.local_rank() == 0 and not path.exists():
            _download(url, path, sha256)
        distributed.barrier()
    if not path.exists():
        hint = (
            "the path of a file"
            if url is None
            else f"the path of a download of {url}, or null on a machine with network access"
        )
        raise ValueError(f"extractor.weights: {path} does not exist; allowed: {hint}")
    try:
        require_kind(path, "network")
    except ValueError as error:
        raise ValueError(f"extractor.weights: {error}") from error
    found = file_sha256(path)
    if sha256 is not None and found != sha256:
        raise ValueError(
            f"extractor.weights: {path} has SHA-256 {found}, expected {sha256}; download it again, or set "
            "extractor.sha256 to this checksum if the file is another network"
        )
    return path


def _download(url: str, path: Path, sha256: str) -> None:
    logger.info("downloading %s to %s", url, path)
    try:
        with atomically(path) as temporary:
            _read(url, temporary, sha256, limit_s(DOWNLOAD))
    except (OSError, ValueError) as error:
        # All ranks, this one too, then find no file, and the error says what to do.
        logger.warning("the download of %s failed: %s", url, error)


def _read(url: str, target: Path, sha256: str, limit: float) -> None:
    digest, end = hashlib.sha256(), time.monotonic() + limit
    with urlopen(url, timeout=SILENCE_S) as answer, target.open("wb") as file:
        while piece := answer.read1(_PIECE):
            digest.update(piece)
            file.write(piece)
            if time.monotonic() > end:
                raise TimeoutError(f"only {file.tell()} bytes came in {limit:.0f} s; or raise {DOWNLOAD}")
    if digest.hexdigest() != sha256:
        raise ValueError(f"its SHA-256 is {digest.hexdigest()}, expected {sha256}")


def load_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, on the CPU.

    Raises:
        ValueError: if the file holds more than tensors and plain containers. Loading that could run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"extractor.weights: {path} is not loaded (weights only): {error}") from error


def as_file(state: dict[str, Tensor]) -> io.BytesIO:
    """Tensors that were loaded safely, as a file for a constructor that would unpickle one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer
