"""Heartbeat: the message of a hang names the missing ranks. Run lock: one job per run folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sfd_scale.runtime import distributed
from sfd_scale.runtime.heartbeat import CollectiveError, Heartbeat, Operation
from sfd_scale.runtime.locks import folder_lock
from tests.helpers.ranks import RankError, run_ranks

TIMEOUT_S = 4.0


def _one_rank_is_late() -> str:
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    try:
        with Heartbeat(TIMEOUT_S, interval_s=1.0) as heartbeat:
            heartbeat.enter(11, Operation.DATA)
            dist.barrier()  # so that a busy machine starts both waits at one time
            if distributed.rank() == 1:
                time.sleep(TIMEOUT_S + 3)
                return ""
            heartbeat.enter(11, Operation.OPTIMIZER)
            dist.all_reduce(torch.ones(1), group=group)
    except CollectiveError as error:
        return str(error)
    raise AssertionError("the collective did not time out")


def test_a_timeout_names_the_operation_the_rank_that_is_missing_and_where_it_is() -> None:
    said, _ = run_ranks(_one_rank_is_late, 2, timeout=400)
    assert "rank 0 waits in 'optimizer step' of step 11" in said
    assert "for rank 1 on " in said and "in 'waiting for data' of step 11" in said
    assert "imed out" in said, "the library's own words stay in the message"


POSITIONS = [
    (5, Operation.DATA), (5, Operation.FORWARD_BACKWARD), (5, Operation.OPTIMIZER), (6, Operation.AGREEMENT),
    (6, Operation.METRICS), (6, Operation.CHECKPOINT), (6, Operation.DATA),
]  # fmt: skip


def _rank_0_explains_each_position_of_rank_1() -> list[str]:
    said = []
    with Heartbeat(60.0, interval_s=5.0) as heartbeat:
        heartbeat.enter(6, Operation.METRICS)
        for position in POSITIONS:
            if distributed.rank() == 1:
                heartbeat.enter(*position)
                heartbeat.explain()  # sends a heartbeat
            distributed.barrier()
            said.append(heartbeat.explain())
            distributed.barrier()
    return said


def test_the_ranks_behind_are_those_earlier_in_the_loop_which_logs_and_saves_after_it_counts_a_step() -> None:
    said, _ = run_ranks(_rank_0_explains_each_position_of_rank_1, 2, timeout=400)
    assert ["for rank 1 on" in text for text in said] == [True] * 4 + [False] * 3
    assert said[-1].endswith("no rank is behind it")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _the_rank_that_serves_the_store_stops() -> str:
    processes = distributed.all_gather_object(os.getpid())
    # As under a launcher: rank 0 serves the store, and all connect to it.
    rank, port = distributed.rank(), distributed.broadcast_object(free_port())
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    if rank == 0:
        with Heartbeat(TIMEOUT_S, interval_s=0.5) as heartbeat:
            heartbeat.enter(11, Operation.DATA)
            dist.all_reduce(torch.ones(1), group=group)
            os.kill(os.getpid(), signal.SIGSTOP)
        return ""
    try:
        with Heartbeat(TIMEOUT_S, interval_s=0.5) as heartbeat:
            heartbeat.enter(11, Operation.OPTIMIZER)
            dist.all_reduce(torch.ones(1), group=group)
            time.sleep(1)
            dist.all_reduce(torch.ones(1), group=group)
    except CollectiveError as error:
        return str(error)
    finally:
        os.kill(processes[0], signal.SIGCONT)
    raise AssertionError("the collective did not time out")


def test_a_rank_that_stops_and_serves_the_store_is_named_without_its_answer() -> None:
    said = run_ranks(_the_rank_that_serves_the_store_stops, 2, timeout=400)[1]
    assert "rank 1 waits in 'optimizer step' of step 11" in said
    assert "does not answer. Rank 0 or its launcher serves the store; its last answer was " in said


def _hang_without_a_timeout() -> None:
    with Heartbeat(0.5, interval_s=0.1) as heartbeat:
        heartbeat.enter(3, Operation.FORWARD_BACKWARD)
        time.sleep(1000)  # as a rank that spins in shared memory


def test_a_hang_that_no_collective_ends_is_ended() -> None:
    with pytest.raises(RankError, match="exit codes of the ranks"):
        run_ranks(_hang_without_a_timeout, 2, timeout=400)


def _a_rank_is_cut_off_while_both_save() -> None:
    with Heartbeat(1.0, interval_s=0.1) as heartbeat:
        heartbeat.enter(3, Operation.CHECKPOINT)
        time.sleep(0.5)
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1000)


def test_a_save_does_not_wait_for_a_rank_that_gives_no_sign(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankError, match="exit codes of the ranks"):
        run_ranks(_a_rank_is_cut_off_while_both_save, 2, timeout=400)
    said = capfd.readouterr().err
    assert "rank 0 waits in 'checkpoint' of step 3 for" in said and "exiting because no sign came from there" in said
    assert "for rank 1 on" in said and "in 'checkpoint' of step 3 at its last heartbeat" in said


def _saves_are_slow(ended: bool) -> str:
    with Heartbeat(0.5, interval_s=0.1) as heartbeat:
        heartbeat.enter(3, Operation.CHECKPOINT)
        if distributed.rank() == 0 or not ended:
            time.sleep(4)
    return "saved"


@pytest.mark.parametrize("ended", [False, True])
def test_a_slow_save_is_waited_for_as_long_as_the_others_give_signs_or_have_ended(ended: bool) -> None:
    assert run_ranks(_saves_are_slow, 2, ended, timeout=400) == ["saved", "saved"]


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="^mine$"), Heartbeat(10.0) as heartbeat:
        heartbeat.enter(0, Operation.METRICS)
        raise RuntimeError("mine")


HOLD = """
import sys, time
from pathlib import Path
from sfd_scale.runtime.locks import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_run_folder_in_use_is_refused_until_its_holder_is_dead(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, env=environment
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    in_use = f"run is in use by process {holder.pid} on .*give another --run"
    with pytest.raises(ValueError, match=in_use), folder_lock(tmp_path / "run"):
        raise AssertionError
    holder.kill()  # not an orderly end
    holder.wait()
    with folder_lock(tmp_path / "run"):
        pass
    with folder_lock(tmp_path / "run"):
        pass
