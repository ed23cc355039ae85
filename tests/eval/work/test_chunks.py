"""A chunk that cannot be written ends the work with a sentence, and an error loses no chunk that is finished."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from eval.work import chunks
from eval.work.chunks import ChunkFolder, Finish


def tensors(folder: ChunkFolder, chunk: int) -> Mapping[ChunkFolder, Mapping[str, Tensor]]:
    return {folder: {"rows": torch.tensor(list(folder.rows(chunk)))}}


def test_chunks_are_written_beside_the_work(tmp_path: Path) -> None:
    folder, threads = ChunkFolder(tmp_path, total=7, size=2), set()

    def produce(chunk: int) -> tuple[Finish, dict[str, Any]]:
        def finish() -> Mapping[ChunkFolder, Mapping[str, Tensor]]:
            threads.add(threading.current_thread() is threading.main_thread())
            return tensors(folder, chunk)

        return finish, {}

    assert chunks.run([folder], produce, "test", "rows") == 7
    assert torch.cat(list(folder.read("rows"))).tolist() == list(range(7)) and threads == {False}
    assert chunks.run([folder], produce, "test", "rows") == 0


def test_a_write_that_does_not_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFD_WORK_TIMEOUT", "1")
    folder, stuck = ChunkFolder(tmp_path, total=6, size=2), threading.Event()

    def produce(chunk: int) -> tuple[Finish, dict[str, Any]]:
        def finish() -> Mapping[ChunkFolder, Mapping[str, Tensor]]:
            if chunk == 1:
                stuck.wait(60)  # as a network file system that does not answer
            return tensors(folder, chunk)

        return finish, {}

    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"a chunk is not written; check the storage .*raise SFD_WORK_TIMEOUT"):
        chunks.run([folder], produce, "test", "rows")
    assert time.monotonic() - began < 30 and folder.missing() == [1, 2]
    stuck.set()
    while 1 in folder.missing():  # the write has its answer, and ends
        time.sleep(0.01)
    assert chunks.run([folder], produce, "test", "rows") == 2 and not folder.missing()


def test_an_error_of_the_next_chunk_waits_for_the_last_one(tmp_path: Path) -> None:
    folder = ChunkFolder(tmp_path, total=4, size=2)

    def produce(chunk: int) -> tuple[Finish, dict[str, Any]]:
        if chunk == 1:
            raise RuntimeError("no memory")

        def finish() -> Mapping[ChunkFolder, Mapping[str, Tensor]]:
            time.sleep(0.3)
            return tensors(folder, chunk)

        return finish, {}

    with pytest.raises(RuntimeError, match="no memory"):
        chunks.run([folder], produce, "test", "rows")
    assert folder.missing() == [1]


def test_the_error_of_a_write_is_raised(tmp_path: Path) -> None:
    folder = ChunkFolder(tmp_path, total=4, size=2)

    def produce(chunk: int) -> tuple[Finish, dict[str, Any]]:
        def finish() -> Mapping[ChunkFolder, Mapping[str, Tensor]]:
            raise OSError(28, "No space left on device")

        return finish, {}

    with pytest.raises(OSError, match="No space"):
        chunks.run([folder], produce, "test", "rows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_one_bit_that_was_flipped_on_the_disk_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = ChunkFolder(tmp_path, total=6, size=2)
    values = torch.arange(1, 19).view(6, 3).to(dtype)
    for chunk in range(3):
        rows = folder.rows(chunk)
        folder.commit(chunk, {"rows": values[rows.start : rows.stop], "empty": torch.zeros(0, 4)})
    assert torch.equal(torch.cat(list(folder.read("rows"))), values)
    data = bytearray(folder.file(1).read_bytes())
    data[-1] ^= 4
    folder.file(1).write_bytes(data)
    with pytest.raises(ValueError, match=r"chunk-000001.safetensors is damaged: rows has another checksum .* again"):
        list(folder.read("rows"))
    assert torch.equal(next(folder.read("rows", [2])), values[4:]) and len(list(folder.read("empty"))) == 3
    folder.file(1).unlink()
    assert folder.missing() == [1]  # and `run` computes it


def test_equal_chunks_have_equal_bytes(tmp_path: Path) -> None:
    """safetensors writes the metadata in a random order, another one each time."""
    folders = [ChunkFolder(tmp_path / str(number), total=2, size=2) for number in range(8)]
    for folder in folders:
        folder.commit(0, {name: torch.arange(4.0) for name in ("pool", "spatial", "logits", "labels")})
    assert len({folder.file(0).read_bytes() for folder in folders}) == 1


def test_chunks_of_earlier_releases_have_no_checksum(tmp_path: Path) -> None:
    folder = ChunkFolder(tmp_path, total=2, size=2)
    folder.file(0).parent.mkdir()
    save_file({"rows": torch.tensor([1, 2])}, folder.file(0), {"made_on": "a CPU"})
    assert next(folder.read("rows")).tolist() == [1, 2] and folder.made_on() == ["a CPU"]
