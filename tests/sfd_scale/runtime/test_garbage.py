"""Garbage is collected at chosen steps, and Python's own collections come back at the end."""

import gc

import pytest

from sfd_scale.runtime import garbage


def test_collections_come_at_chosen_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "EVERY", 5)
    before, frozen = gc.isenabled(), gc.get_freeze_count()
    collected: list[int] = []

    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            collected.append(schedule.steps)

    with garbage.ScheduledCollection() as schedule:
        for _ in range(12):
            Cycle()
            schedule.after_step()
            if schedule.steps == garbage.FIRST:
                assert not gc.isenabled() and gc.get_freeze_count() > frozen
    # Each collection takes the cycles of the steps before it.
    assert collected == [3] * 3 + [5] * 2 + [10] * 5
    assert gc.isenabled() == before and gc.get_freeze_count() == 0
    gc.collect()
    assert len(collected) == 12


def test_an_error_brings_python_s_own_collections_back() -> None:
    with pytest.raises(RuntimeError), garbage.ScheduledCollection() as schedule:
        for _ in range(garbage.FIRST):
            schedule.after_step()
        raise RuntimeError
    assert gc.isenabled()
