"""Leftovers of killed writers are removed by the next start. One that cannot be removed is passed by."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sfd_scale.checkpoint import Checkpoint, CheckpointConfig, CheckpointManager
from sfd_scale.data.writer import ChunkNote, is_committed, write_chunk, writing
from sfd_scale.runtime import files, leftovers
from sfd_scale.runtime.leftovers import free_path, make_way, remove, remove_temporary_files, temporary_path
from tests.helpers.encoded import encode_digits

KILLED_WRITER = """
import os, sys
from pathlib import Path
from sfd_scale.runtime.files import atomically
with atomically(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), 9)
"""


def kill_a_writer(path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED_WRITER, str(path)], check=False).returncode == -9


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["recipe.json", "weights", f"{'x' * 240}.json", "bild-ä🙂.png"])
def test_the_next_write_to_a_folder_removes_what_a_killed_writer_left(tmp_path: Path, name: str) -> None:
    kill_a_writer(tmp_path / name)
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0] != name
    files.write_json(tmp_path / "other.json", 1)
    assert names(tmp_path) == ["other.json"]


def test_only_files_without_a_writer_are_removed(tmp_path: Path) -> None:
    own, dead = temporary_path(tmp_path / "a.json"), 4_000_000  # above the largest process id
    host = own.name.split(".")[2]
    gone = [own.name.replace(f".{os.getpid()}.", f".{dead}.")]
    kept = [
        own.name, own.name.replace(f".{os.getpid()}.", ".1."),  # processes that live
        f".a.h00000000.{dead}.0123abcd.json", f".a.{dead}.0123abcd.json",  # of another host, or of an earlier release
        ".a.json", f".a.{dead}.json", f".a.{host}.{dead}.json", ".gitignore", f"a.{host}.{dead}.0123abcd.json",
    ]  # fmt: skip
    old = [f".b.h00000000.{dead}.0123abcd.json", f".b.{dead}.0123abcd", f".b.h00000000.{os.getpid()}.0123abcd.pt"]
    for name in (*gone, *kept, *old):
        (tmp_path / name).touch()
    for name in (*old, ".gitignore", own.name):
        os.utime(tmp_path / name, (0, time.time() - leftovers.ABANDONED_AFTER_S - 60))
    remove_temporary_files(tmp_path)
    assert names(tmp_path) == sorted(kept)
    remove_temporary_files(tmp_path / "none")


# ------------------------------------------------------------------------- a leftover that cannot be removed


BUSY = ("mount --bind /etc/hostname {}", "umount {}")  # as a `.nfs` file of NFS that a process has open
IMMUTABLE = ("chattr +i {}", "chattr -i {}")
READ_ONLY = ("chmod 500 {}/..", "chmod 700 {}/..")
Stuck = Callable[[Path], None]


@pytest.fixture(params=[BUSY, IMMUTABLE] if os.geteuid() == 0 else [READ_ONLY])
def stuck(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stuck]:
    """Creates a file, whose name begins with .nfs, that cannot be removed until the end of the test."""
    make, undo = request.param

    def create(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        if subprocess.run(make.format(file).split(), check=False).returncode:
            pytest.skip(f"{make}: not possible here")

    yield create
    for file in tmp_path.rglob(".nfs*"):  # a test may have moved it
        subprocess.run(undo.format(file).split(), check=False)


def test_a_name_that_is_taken_for_good_is_passed_by(
    tmp_path: Path, stuck: Stuck, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "step-00000008.tmp"
    stuck(path / ".nfs0001")
    (path / "half").touch()
    assert free_path(path) == tmp_path / "step-00000008.2.tmp"
    assert not (path / "half").exists() or os.geteuid() != 0, "what can be removed is"
    assert f"{path} cannot be removed and is passed by" in caplog.text and ".nfs0001" in caplog.text
    stuck(tmp_path / "step-00000008.2.tmp" / "inner" / ".nfs0002")
    assert free_path(path) == tmp_path / "step-00000008.3.tmp"
    make_way(path)
    assert not path.exists() and (tmp_path / ".step-00000008.tmp.left" / ".nfs0001").exists()
    assert free_path(path) == path and remove(tmp_path / "nothing")


def test_a_leftover_in_the_checkpoints_does_not_stop_a_run(tmp_path: Path, stuck: Stuck) -> None:
    folder = tmp_path / "checkpoints"
    parts = {"model": {"w": torch.arange(4.0)}}
    for name in ("step-00000002.tmp", "step-00000002.deleted"):
        stuck(folder / name / ".nfs0001")
    manager = CheckpointManager(folder, CheckpointConfig(every=1, keep_last=1))
    for step in (2, 4):  # the save of 4 deletes 2
        manager.save_whole(step, parts, 0, {})
        assert Checkpoint.of_step(folder, step).damage() is None
    manager.remove_leftovers()
    assert names(folder) == ["step-00000002.deleted", "step-00000002.tmp", "step-00000004"]
    assert manager.latest() == Checkpoint.of_step(folder, 4)


def test_a_leftover_in_the_chunks_does_not_stop_an_encode(tmp_path: Path, stuck: Stuck) -> None:
    columns, rows = {"id": "int"}, [{"id": number} for number in range(5)]
    for name in ("000000.tmp", "000001"):  # of a killed writer; of a chunk whose shards were lost
        stuck(tmp_path / "chunks" / name / ".nfs0001")
    for chunk in (0, 1):
        write_chunk(tmp_path, chunk, columns, rows, ChunkNote([], None))
        assert is_committed(tmp_path, chunk)
    (tmp_path / "chunks" / "000003.tmp").mkdir()
    with writing(tmp_path):
        assert names(tmp_path / "chunks") == [".000001.left", "000000", "000000.tmp", "000001", "claims", "lock"]


KILLED_AT_THE_END = """
import os, sys
from pathlib import Path
from sfd_scale.data import writer
from tests.helpers.encoded import encode_digits
end = writer.Claims.__exit__
def killed(self, *error):  # rank 0 after its last file
    os.kill(os.getpid(), 9)
writer.Claims.__exit__ = killed
encode_digits(Path(sys.argv[1]), 8, latents="none", image=True)
"""


def test_a_kill_after_the_last_file_of_an_encode_leaves_nothing(tmp_path: Path) -> None:
    """The folder is complete, so the next start writes nothing to it."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    encode_digits(whole, 8, latents="none", image=True)
    done = subprocess.run([sys.executable, "-c", KILLED_AT_THE_END, str(out)], check=False)
    assert done.returncode == -9 and (out / "manifest.json").is_file() and (out / "chunks/claims").is_dir()
    (out / "chunks/000009.tmp").mkdir()
    kill_a_writer(out / "manifest.json")
    encode_digits(out, 8, latents="none", image=True)
    tree = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert tree == {str(path.relative_to(whole)) for path in whole.rglob("*")}
    assert (out / "chunks/lock").read_bytes() == b""
