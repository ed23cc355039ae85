"""Hang dump: stacks and flight recorder of a hang. And the profile of a few steps."""

import gzip
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sfd_scale.runtime import distributed
from sfd_scale.runtime.hang_dump import HangDump
from sfd_scale.runtime.profiling import ProfileConfig, StepProfiler


def lost_in_thought() -> None:
    time.sleep(6)


def hang(folder: Path, timeout_s: float) -> None:
    """Rank 1 goes away; rank 0 waits for it in a collective."""
    with HangDump(folder, timeout_s) as recorder:
        distributed.init(timeout_s)
        distributed.all_reduce_sum(torch.ones(3))
        recorder.alive()
        if distributed.rank() == 1:
            lost_in_thought()
            os._exit(0)
        distributed.all_reduce_sum(torch.ones(5))


@pytest.mark.full
def test_a_hang_leaves_stacks_and_collectives(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # Not run_ranks: its process group would start before the recorder.
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env={**os.environ, "RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for r in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [1, 0]
    waiting, gone = ((tmp_path / f"stacks-rank-{r}.txt").read_text() for r in range(2))
    assert "Timeout" in waiting and "all_reduce_sum" in waiting and "in hang" in waiting
    assert "lost_in_thought" in gone
    entries = pickle.loads((tmp_path / "collectives-rank-0").read_bytes())["entries"]
    assert [(e["profiling_name"], e["input_sizes"]) for e in entries] == [
        ("gloo:all_reduce", [[3]]), ("gloo:all_reduce", [[5]]),
    ]  # fmt: skip


def test_stacks_on_demand(tmp_path: Path) -> None:
    stacks = ""
    with HangDump(tmp_path, 600.0):
        # faulthandler walks the list of threads without a lock. A thread of another test that ends meanwhile cuts it.
        for _ in range(10):
            os.kill(os.getpid(), signal.SIGUSR2)
            stacks = (tmp_path / "stacks-rank-0.txt").read_text()
            if "test_stacks_on_demand" in stacks:
                return
            time.sleep(0.1)
    pytest.fail(f"not the stack of this test: {stacks}")


def test_a_window_of_steps_is_profiled(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileConfig(steps="2..3"), tmp_path, torch.device("cpu"))
    for step in range(6):
        profiler.before_step(step)
        torch.mm(torch.ones(8, 8), torch.ones(8, 8))
    trace = json.loads(gzip.decompress((tmp_path / "trace-2-3.json.gz").read_bytes()))
    assert [e["name"] for e in trace["traceEvents"] if e.get("cat") == "cpu_op"].count("aten::mm") == 2
    table = (tmp_path / "kernels-2-3.txt").read_text()
    assert re.search(r"aten::mm .* 2 *$", table, re.MULTILINE)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_that_ends_within_the_window_writes_what_it_has(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileConfig(steps="1..9"), tmp_path, torch.device("cpu"))
    for step in range(3):
        profiler.before_step(step)
    profiler.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kernels-1-2.txt", "trace-1-2.json.gz"]
    with pytest.raises(ValueError, match=r"steps: '5\.\.2'; allowed: FIRST\.\.LAST"):
        ProfileConfig(steps="5..2")


if __name__ == "__main__":
    hang(Path(sys.argv[1]), 3.0)
