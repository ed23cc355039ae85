"""The peer of benchmarks/muon.py does the same work: it moves the weights as our Muon does."""

from __future__ import annotations

import pytest
import torch

from benchmarks.muon import MUON, _replicated
from benchmarks.train_step import our_model
from sfd_scale.engines.fsdp import FSDPConfig, FSDPEngine, make_fsdp
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import distance, params


def _started() -> FSDPEngine:
    model = our_model("S", 1)
    model.init_weights(0)
    engine = make_fsdp(model, MUON, FSDPConfig(precision="fp32"))
    for index, parameter in enumerate(engine.model.parameters()):
        parameter.grad = torch.full_like(parameter, 1e-3 * (index + 1))
    return engine


def _differences() -> tuple[float, float]:
    """Between both after a step, and of a step."""
    ours, theirs, before = _started(), _started(), params(_started())
    ours.optimizer.step()
    _replicated(theirs.optimizer, dict(theirs.model.named_parameters()))()  # type: ignore[arg-type]
    return distance(params(ours), params(theirs)), distance(params(ours), before)


@pytest.mark.full
def test_a_muon_on_every_rank_moves_the_weights_as_ours() -> None:
    apart, moved = run_ranks(_differences, 2)[0]
    assert apart < 1e-6 < 1e-4 < moved
