"""Run a function on several gloo ranks of this machine, or alone: `run_ranks(fn, world_size, *args)`."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Variables of a launcher. A process that runs alone must not inherit them.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankError(RuntimeError):
    """A rank failed; the message is its traceback."""


def _entry(rank: int, world_size: int, port: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The main function of one rank. With world_size 0 it runs without a process group."""
    torch.set_num_threads(1)
    out = Path(folder)
    try:
        for name in _LAUNCHER:
            os.environ.pop(name, None)
        if world_size:
            values = (rank, world_size, rank, world_size, "127.0.0.1", port)
            os.environ |= {name: str(value) for name, value in zip(_LAUNCHER, values, strict=True)}
            dist.init_process_group(
                "gloo", init_method=f"file://{out / 'rendezvous'}", rank=rank, world_size=world_size,
                timeout=timedelta(seconds=180),
            )  # fmt: skip
        torch.save(fn(*args), out / f"{rank}.pt")
        if world_size:
            dist.barrier()
    except BaseException:  # noqa: BLE001  the parent raises the error
        (out / f"{rank}.error").write_text(f"{time.time()}\n{traceback.format_exc()}")
        # os._exit, because destructors of a broken group may wait for dead ranks.
        os._exit(1)
    os._exit(0)


def run_alone(fn: Callable[..., Any], *args: Any, timeout: float = 300.0) -> Any:
    """Run `fn(*args)` in one new process, without launcher and process group; see `run_ranks`."""
    return _run(fn, 0, args, timeout)[0]


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """Run `fn(*args)` on `world_size` new processes in one gloo group; returns their results by rank.

    `fn` must be importable (a module-level function) and return a value that torch.save can write.

    Raises:
        RankError: with the traceback of the rank that failed first, or after `timeout` seconds.
    """
    assert world_size >= 1
    return _run(fn, world_size, args, timeout)


def _run(fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout: float) -> list[Any]:
    # Set before a child loads its libraries: more threads than cores would slow it down.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = mp.get_context("spawn")
    # The rendezvous is a file, but DeepSpeed names its shared memory after the port: every run needs its own port.
    with tempfile.TemporaryDirectory() as folder, socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        ranks = [
            context.Process(target=_entry, args=(rank, world_size, port, folder, fn, args), daemon=True)
            for rank in range(max(world_size, 1))
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        while any(p.is_alive() for p in ranks) and all(p.exitcode in (None, 0) for p in ranks):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        late = any(p.is_alive() for p in ranks) and all(p.exitcode in (None, 0) for p in ranks)
        if any(p.is_alive() for p in ranks) and not late:
            time.sleep(0.5)  # the error of another rank may be earlier
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
        _raise_first(Path(folder), [p.exitcode for p in ranks], late, timeout)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(len(ranks))]


def _raise_first(folder: Path, codes: list[int | None], late: bool, timeout: float) -> None:
    errors = sorted((file.read_text().split("\n", 1), file.stem) for file in folder.glob("*.error"))
    if errors:
        (_, text), rank = errors[0]
        raise RankError(f"rank {rank} of {len(codes)}:\n{text}")
    if late:
        raise RankError(f"{len(codes)} ranks were still running after {timeout:.0f} s")
    if any(codes):
        raise RankError(f"exit codes of the ranks: {codes}")
