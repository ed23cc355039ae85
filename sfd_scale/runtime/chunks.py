"""Work in chunks, shared by the ranks of a job and by several jobs.

The result of a chunk is a file or folder that is committed by a rename, so a later start skips the chunks that are
whole. `Claims` hands out the other chunks, each to one process. A process takes the next chunk when it is done with the
last one, and waits for no other until none is left. The claims of a job that died are free again.

    claims/
        5.claim         symbolic link to the job that works on chunk 5
        0f3a2b…         the job: a file that its rank 0 keeps locked until it ends; names its host and process
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from sfd_scale.runtime import distributed
from sfd_scale.runtime.limits import WORK, limit_s
from sfd_scale.runtime.locks import try_lock

logger = logging.getLogger(__name__)
POLL_S = 2.0  # between looks at the work of other jobs
SAY_AGAIN_S = 300.0  # between messages about the same wait


class Claims:
    """The claims of one job on the chunks of one folder; a context manager. All ranks have to enter and leave together.

    Creating a link is atomic on local and on network file systems, and so is a lookup of its target. So no chunk is
    handed out twice, and a claim always names its job.

    Args:
        folder: for the claims. It is removed when no job has claims in it.
        limit: the name of the limit (runtime/limits.py) of a wait in which no other job takes or frees a claim.
    """

    def __init__(self, folder: Path, limit: str = WORK) -> None:
        self.folder, self.job, self.limit = folder, "", limit
        self._descriptor: int | None = None
        self._seen: tuple[frozenset[str], float] | None = None  # the claims at the last change, and its time
        self._said = -SAY_AGAIN_S

    def __enter__(self) -> Self:
        if distributed.is_main():
            self.job, self._descriptor = self._register()
            self.free_abandoned()
        self.job = distributed.broadcast_object(self.job)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            distributed.barrier()
        if self._descriptor is not None:
            if kind is None or distributed.world_size() == 1:  # otherwise other ranks may still claim
                self._free(self.job)
            os.close(self._descriptor)
            with suppress(OSError):  # other jobs have claims in it
                self.folder.rmdir()

    def _register(self) -> tuple[str, int]:
        """Create the file of this job: its name, and its descriptor, which holds the lock."""
        job = uuid.uuid4().hex[:12]
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The file gets its name when it is locked, so no other job takes it for that of a dead job.
            unnamed = self.folder / f".{job}"
            with suppress(FileNotFoundError):  # another job has just removed the folder or the file: again
                descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o666)
                if try_lock(descriptor, self.folder):
                    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                    with suppress(FileNotFoundError):
                        os.rename(unnamed, self.folder / job)
                        return job, descriptor
                os.close(descriptor)

    # ------------------------------------------------------------------------------------------- claiming

    def take(self, chunk: int | str) -> bool:
        """Claim a chunk for this rank; False if it is claimed already."""
        try:
            os.symlink(self.job, self._link(chunk))
        except FileExistsError:
            return False
        return True

    def unclaimed(self, chunks: Iterable[int]) -> list[int]:
        """Those of the chunks that no rank of any job has claimed yet."""
        names = set(os.listdir(self.folder))
        return [chunk for chunk in chunks if self._link(chunk).name not in names]

    def rounds(self, count: int, is_whole: Callable[[int], bool]) -> Iterator[tuple[list[int], Iterator[int]]]:
        """Pairs of the missing chunks, and those of them that this rank claims; until no chunk is missing.

        The second iterator claims a chunk when it is asked for the next one. The ranks finish their chunks before they
        ask for the next pair. There is one only if another job works on the rest, for what that job does not finish.

        Args:
            is_whole: whether a chunk, of 0 to `count` - 1, is committed.

        Raises:
            ValueError: on all ranks, if chunks that this job claimed are still missing.
            TimeoutError: on all ranks, if another job does not finish its chunks.
        """

        def missing() -> list[int]:
            return [chunk for chunk in range(count) if not is_whole(chunk)]

        todo: list[int] = distributed.broadcast_object(missing() if distributed.is_main() else None)
        while todo:
            # Another job may have done a chunk, and left, since the list was made.
            yield todo, (chunk for chunk in todo if self.take(chunk) and not is_whole(chunk))
            distributed.barrier()
            lost: list[int] = []
            late: TimeoutError | None = None
            if distributed.is_main():
                todo = missing()
                lost = [chunk for chunk in todo if _target(self._link(chunk)) == self.job]
                if todo and not lost:
                    try:
                        self.wait()
                    except TimeoutError as error:
                        late = error
            todo, lost, late = distributed.broadcast_object((todo, lost, late))
            if late is not None:
                raise late
            if lost:
                raise ValueError(
                    f"{self.folder.parent}: {len(lost)} of {count} chunks are missing; give the command again"
                )

    # ------------------------------------------------------------------------------------------- other jobs

    def wait(self) -> None:
        """Give other jobs time for their chunks, and free the claims of those that died.

        Raises:
            TimeoutError: if the claims have not changed for the limit. It names the jobs that hold them.
        """
        claims, now = frozenset(os.listdir(self.folder)), time.monotonic()
        if self._seen is None or self._seen[0] != claims:
            self._seen = (claims, now)
        limit = limit_s(self.limit)
        if now - self._seen[1] > limit:
            raise TimeoutError(
                f"{self.folder.parent}: {self._holders()}, without progress for {limit} s; look at its log, end "
                f"it and give the command again, or raise {self.limit}"
            )
        if now - self._said >= SAY_AGAIN_S:
            self._said = now
            logger.info("%s: %s; waiting, without progress at most %d s", self.folder.parent, self._holders(), limit)
        time.sleep(POLL_S)
        self.free_abandoned()

    def _holders(self) -> str:
        """The other jobs, with their claims."""
        held: dict[str, list[str]] = {}
        for link in sorted(self.folder.glob("*.claim")):
            job = _target(link)
            if job is not None and job != self.job:
                held.setdefault(job, []).append(link.name.removesuffix(".claim"))
        if not held:
            return "another job has just ended"
        return "; ".join(f"{self._name(job)} works on {_listed(chunks)}" for job, chunks in held.items())

    def _name(self, job: str) -> str:
        try:
            return (self.folder / job).read_text(encoding="utf-8", errors="replace") or "another job"
        except OSError:
            return "another job"

    def remove_abandoned(self) -> None:
        """Remove the folder if no living job has claims in it."""
        with suppress(FileNotFoundError):
            self.free_abandoned()
        with suppress(OSError):
            self.folder.rmdir()

    def free_abandoned(self) -> None:
        """Free the claims of jobs that died. One process at a time has the lock of a dead job, and frees its claims."""
        for file in self.folder.iterdir():
            if file.name == self.job or file.is_symlink() or not file.is_file():
                continue
            with suppress(FileNotFoundError):  # its job has just ended
                descriptor = os.open(file, os.O_RDWR)
                try:
                    if try_lock(descriptor, self.folder):
                        self._free(file.name)
                finally:
                    os.close(descriptor)

    def _free(self, job: str) -> None:
        for link in self.folder.glob("*.claim"):
            if _target(link) == job:
                link.unlink()
        (self.folder / job).unlink(missing_ok=True)

    def _link(self, chunk: int | str) -> Path:
        return self.folder / f"{chunk}.claim"


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join([*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])])


def _target(link: Path) -> str | None:
    """The job of a claim; None if the claim is gone."""
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return None
