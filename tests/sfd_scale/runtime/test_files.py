"""Atomic writes: a full disk or an error leaves the earlier file unchanged."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from sfd_scale.checkpoint.official_checkpoint import write_official
from sfd_scale.runtime import files


def through_torch() -> None:
    """As torch.save: its own error hides that of the file."""
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
        raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904


def by_safetensors() -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def by_the_system() -> None:
    raise OSError(errno.EDQUOT, "Disk quota exceeded")


@pytest.mark.parametrize("fail", [through_torch, by_safetensors, by_the_system])
def test_a_full_disk_is_named_and_leaves_the_earlier_file(tmp_path: Path, fail: Callable[[], None]) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})
    with pytest.raises(ValueError, match=r"a\.json: the disk is full"), files.atomically(path) as partial:
        partial.write_bytes(b"half")
        fail()
    assert path.read_text() == '{\n "x": 1\n}\n' and os.listdir(tmp_path) == ["a.json"]


def test_another_error_passes_through(tmp_path: Path) -> None:
    with pytest.raises(KeyError), files.atomically(tmp_path / "a") as partial:
        partial.write_bytes(b"half")
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_named_when_torch_save_hides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save's real error, of a device that is always full."""
    monkeypatch.setattr(files, "temporary_path", lambda path: path.with_name(f".full{path.suffix}"))
    (tmp_path / ".full.pt").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"1\.pt: the disk is full"):
        write_official(tmp_path / "1.pt", ema={"x": torch.zeros(100_000)})
    assert os.listdir(tmp_path) == []
