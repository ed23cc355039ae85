"""A step reads one number from the device, the norm of the gradient: each read waits for all work before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.train_step import LAYOUT, batch_of, our_model, randomize
from sfd_scale.data.waiting import PatientBatches
from sfd_scale.diffusion.conditioning import ClassLabels
from sfd_scale.diffusion.schedule import SemanticFirstSchedule
from sfd_scale.engines.ema import EMA, EMAConfig
from sfd_scale.engines.fsdp import FSDPConfig, make_fsdp
from sfd_scale.engines.optim import AdamWConfig
from sfd_scale.runtime.matmul import bf16_matmul_on_cpu
from sfd_scale.runtime.run_paths import RunPaths
from sfd_scale.training.divergence import DivergenceConfig, DivergenceWatch
from sfd_scale.training.metrics import TrainingMetrics
from sfd_scale.training.semantic_first import SemanticFirstConfig, SemanticFirstObjective
from sfd_scale.training.trainer import Trainer, TrainerConfig
from tests.helpers.ranks import run_alone
from tests.helpers.tiny import Spec, batch, make_engine


class Reads(TorchDispatchMode):
    """Counts numbers that Python reads of a tensor: `item`, `float`, `bool`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Counts the copies of whole tensors to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (Tensor.tolist, Tensor.cpu, Tensor.numpy)
        return func(*args, **(kwargs or {}))


def trainer(tmp_path: Path) -> Trainer:
    model = our_model("S", 1)
    randomize(model)
    engine = make_fsdp(model, AdamWConfig(), FSDPConfig(grad_clip=1.0))
    schedule = SemanticFirstSchedule(delta_t=0.3)
    absent = cast(Any, None)  # a step saves and writes nothing
    return Trainer(
        config=TrainerConfig(steps=2, global_batch=4, micro_batch=2), engine=engine,
        objective=SemanticFirstObjective(SemanticFirstConfig(), LAYOUT, schedule, ClassLabels(1000), seed=0),
        batches=absent, grad_accum_steps=2, learning_rate=lambda step: 1e-4, ema=EMA(engine.fragments(), EMAConfig()),
        checkpoints=absent, watch=DivergenceWatch(DivergenceConfig(), RunPaths(tmp_path)), metrics=TrainingMetrics(),
        writer=absent, state={}, check_state=lambda state: None, before_step=lambda step: None,
    )  # fmt: skip


def test_a_step_of_two_micro_batches_reads_the_norm_and_nothing_else(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    for step in range(2):
        # The thread that reads ahead makes the draws; its reads of keys on the host wait for no device.
        batches = PatientBatches(map(made.objective.prepare, iter([batch_of(2)] * 2)), limit_s=60, advice="")
        with bf16_matmul_on_cpu(torch.device("cpu")), Reads() as reads, Copies() as copies:
            result = made.train_step(step, batches)
        assert result.applied and (reads.count, copies.count) == (1, 0)


def reads_under_zero(stage: int) -> list[int]:
    """Of DeepSpeed's step: for each of three steps."""
    engine, found = make_engine(Spec("deepspeed", {"zero_stage": stage, "precision": "bf16"})), []
    for step in range(3):
        x, y = batch(step)
        engine.backward((engine.model(x) - y).square().mean(), last=True)
        with Reads() as reads:
            assert engine.step(1e-3).applied
        found.append(reads.count)
    engine.close()
    return found


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_of_zero_reads_nothing_but_the_norm(stage: int) -> None:
    # With DeepSpeed's test of each gradient for Inf there are five reads.
    assert run_alone(reads_under_zero, stage) == [4, 4, 4]


def test_every_kind_of_read_is_counted() -> None:
    with Reads() as reads, Copies() as copies:
        float(torch.ones(()))
        bool(torch.ones(()) > 0)
        torch.ones(2).tolist()
        torch.ones(2).cpu()
    assert (reads.count, copies.count) == (2, 2)
