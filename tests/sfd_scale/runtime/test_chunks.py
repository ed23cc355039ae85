"""Claims: each chunk once over ranks and jobs, free again when a job dies, and nothing left at the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfd_scale.runtime import chunks, distributed
from sfd_scale.runtime.chunks import Claims
from sfd_scale.runtime.files import write_atomically
from tests.helpers.ranks import RankError, run_ranks

COUNT = 12


def missing(folder: Path) -> list[int]:
    return [chunk for chunk in range(COUNT) if not (folder / f"{chunk}.done").is_file()]


def work(folder: Path, seconds: float = 0.0) -> list[int]:
    """Do what is missing; the chunks that this rank did."""
    mine: list[int] = []
    with Claims(folder / "claims") as claims:
        for _, pulled in claims.rounds(COUNT, lambda chunk: chunk not in missing(folder)):
            for chunk in pulled:
                time.sleep(seconds)
                assert not (folder / f"{chunk}.done").exists(), "done twice"
                write_atomically(folder / f"{chunk}.done", str(os.getpid()))
                mine.append(chunk)
    return mine


def work_unevenly(folder: Path) -> list[int]:
    return work(folder, 0.2 if distributed.rank() == 1 else 0.01)


def in_another_process(folder: Path, code: str) -> subprocess.Popen[bytes]:
    """A job of one process; `claims` holds its claims."""
    code = f"import sys, time; from pathlib import Path\nwith Claims(Path(sys.argv[1])) as claims:\n    {code}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", f"from sfd_scale.runtime.chunks import Claims; {code}", str(folder / "claims")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, env=environment)


def holder_of(folder: Path, *taken: int) -> subprocess.Popen[bytes]:
    """Another job, which has claimed these chunks and holds them."""
    job = in_another_process(folder, f"print([claims.take(n) for n in {taken}], flush=True); sys.stdin.read()")
    assert job.stdout is not None and b"False" not in job.stdout.readline()
    return job


def test_ranks_do_each_chunk_once_and_a_slow_one_does_fewer(tmp_path: Path) -> None:
    write_atomically(tmp_path / "3.done", "earlier")
    fast, slow, other = run_ranks(work_unevenly, 3, tmp_path)
    assert sorted([*fast, *slow, *other]) == [chunk for chunk in range(COUNT) if chunk != 3]
    assert len(slow) < min(len(fast), len(other))
    assert not (tmp_path / "claims").exists(), "nothing is left"
    assert work(tmp_path) == []


def test_the_chunks_of_a_killed_job_are_free_at_the_next_start(tmp_path: Path) -> None:
    job = holder_of(tmp_path, 0, 5)
    job.kill()
    job.wait()
    assert work(tmp_path) == list(range(COUNT))
    assert not (tmp_path / "claims").exists()


def test_a_job_leaves_the_chunks_of_another_one_until_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong implementation would do them at once, or never."""
    monkeypatch.setattr(chunks, "POLL_S", 0.1)
    job = holder_of(tmp_path, 0, 5)
    waits = 0
    wait = Claims.wait

    def killed_at_the_second(self: Claims) -> None:
        nonlocal waits
        assert missing(tmp_path) == [0, 5], "all others are done, and these belong to a job that lives"
        waits += 1
        if waits == 2:
            job.kill()
            job.wait()
        wait(self)

    monkeypatch.setattr(Claims, "wait", killed_at_the_second)
    done = work(tmp_path)
    assert done == [*(chunk for chunk in range(COUNT) if chunk not in (0, 5)), 0, 5] and waits == 2


def test_a_job_that_hangs_ends_the_wait_of_the_others_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "POLL_S", 0.1)
    monkeypatch.setenv("SFD_WORK_TIMEOUT", "1")
    job = holder_of(tmp_path, 0, 5)
    job.send_signal(signal.SIGSTOP)
    try:
        named = rf"process {job.pid} on {socket.gethostname()} works on 0, 5, without progress for 1 s"
        with pytest.raises(TimeoutError, match=rf"{tmp_path}: {named}.* raise SFD_WORK_TIMEOUT"):
            work(tmp_path)
        assert missing(tmp_path) == [0, 5]
    finally:
        job.kill()
        job.wait()
    assert work(tmp_path) == [0, 5]


def test_a_job_that_goes_on_is_waited_for_longer_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "POLL_S", 0.1)
    monkeypatch.setenv("SFD_WORK_TIMEOUT", "4")
    steps = "for n in range(6): claims.take(n); print(n, flush=True); time.sleep(1.0)"
    job = in_another_process(tmp_path, steps)
    assert job.stdout is not None and job.stdout.readline() == b"0\n"
    with Claims(tmp_path / "claims") as claims:
        while not claims.take(5):
            claims.wait()
    job.wait()


def test_all_ranks_end_a_wait_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFD_WORK_TIMEOUT", "1")
    job = holder_of(tmp_path, 0)
    try:
        with pytest.raises(RankError, match=rf"TimeoutError: .*process {job.pid} .* works on 0"):
            run_ranks(work, 2, tmp_path)
    finally:
        job.kill()
        job.wait()


def test_two_jobs_share_the_chunks_of_a_folder(tmp_path: Path) -> None:
    code = "from tests.sfd_scale.runtime.test_chunks import work; from pathlib import Path; import sys\n"
    code += "print(*work(Path(sys.argv[1]), 0.1))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    done = [[int(chunk) for chunk in job.communicate(timeout=120)[0].split()] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert sorted(done[0] + done[1]) == list(range(COUNT)) and not (tmp_path / "claims").exists()


def test_a_chunk_that_is_missing_after_it_was_done_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"1 of 12 chunks are missing; give the command again"),
        Claims(tmp_path / "claims") as claims,
    ):
        for _, pulled in claims.rounds(COUNT, lambda chunk: chunk not in missing(tmp_path)):
            for chunk in pulled:
                if chunk != 4:
                    write_atomically(tmp_path / f"{chunk}.done", "")
    assert work(tmp_path) == [4]
