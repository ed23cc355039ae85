"""Every engine against the same training in plain torch: losses, gradient norms, weights, EMA, skipped steps."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sfd_scale.engines.deepspeed import DeepSpeedConfig, deepspeed_json
from sfd_scale.engines.engine import Fragment, check_fragments
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.models.layers import RMSNorm
from sfd_scale.runtime import distributed
from tests.helpers import agreement
from tests.helpers.ranks import RankError, run_alone, run_ranks
from tests.helpers.tiny import (
    DECAY,
    Spec,
    TinyModel,
    distance,
    make_ema,
    make_engine,
    params,
    plain,
    relative,
    train,
    whole,
)

STEPS = 20
NAN_STEP = 7

FP32 = {
    "zero0": Spec("deepspeed", {"zero_stage": 0}),
    "zero1": Spec("deepspeed", {"zero_stage": 1}),
    "zero2": Spec("deepspeed", {"zero_stage": 2}, 2),
    # Parameters of more than 100 elements are sharded between uses; smaller ones stay whole.
    "zero3": Spec("deepspeed", {"zero_stage": 3, "persistent_elements": 100}),
    "zero1 accumulated, checkpointed": Spec("deepspeed", {"zero_stage": 1, "activation_checkpointing": "block"}, 2),
    "zero3 accumulated, checkpointed": Spec(
        "deepspeed", {"zero_stage": 3, "persistent_elements": 0, "activation_checkpointing": "block"}, 4
    ),
    "zero2 offloaded": Spec("deepspeed", {"zero_stage": 2, "offload_optimizer": True}),
    "zero3 offloaded": Spec(
        "deepspeed", {"zero_stage": 3, "persistent_elements": 0, "offload_optimizer": True, "offload_params": True}
    ),
    "fsdp": Spec("fsdp"),
    "fsdp accumulated, checkpointed": Spec("fsdp", {"activation_checkpointing": "block"}, 4),
    "fsdp selective, kept": Spec("fsdp", {"activation_checkpointing": "selective", "reshard_after_forward": False}),
    "fsdp whole parameters": Spec("fsdp", {"flat_parameters": False}),
    "zero1 whole parameters": Spec("deepspeed", {"zero_stage": 1, "flat_parameters": False}),
    "fsdp replicate": Spec("fsdp", {"sharding": "replicate"}),
    "fsdp offloaded": Spec("fsdp", {"cpu_offload": True}),
}
BF16 = {
    "zero1": Spec("deepspeed", {"zero_stage": 1, "precision": "bf16"}),
    "zero3": Spec("deepspeed", {"zero_stage": 3, "precision": "bf16", "persistent_elements": 100}, 2),
    "fsdp": Spec("fsdp", {"precision": "bf16"}),
}
NAN = {
    "zero0": FP32["zero0"],
    "zero1": BF16["zero1"],
    "zero2": FP32["zero2"],
    "zero2 offloaded": Spec("deepspeed", {"zero_stage": 2, "precision": "bf16", "offload_optimizer": True}, 2),
    "zero3": FP32["zero3"],
    "fsdp": FP32["fsdp"],
}
ALL = {"fp32": FP32, "bf16": BF16, "nan": NAN}
ALONE = {"zero1": FP32["zero1"], "fsdp": FP32["fsdp"]}


def run(spec: Spec, nan_step: int | None) -> dict[str, Any]:
    engine = make_engine(spec)
    start, ema = params(engine), make_ema(engine)
    average = start
    out: dict[str, Any] = {"loss": [], "norm": [], "applied": []}
    for step in range(STEPS):
        for name, values in train(engine, ema, [step], spec.grad_accum_steps, nan_step).items():
            out[name] += values
        if out["applied"][-1]:
            average = {name: DECAY * average[name] + (1 - DECAY) * value for name, value in params(engine).items()}
    out |= {"start": start, "params": params(engine), "ema": whole(engine.fragments(), ema.tensors)}
    out["whole average"] = average
    with ema.swapped(engine), torch.no_grad():
        engine.model.eval()
        x = torch.ones(2, 8)
        out |= {"averaged output": engine.model(x), "swapped": params(engine)}
    out |= {"steps": engine.optimizer_steps, "describe": engine.describe(), "restored": params(engine)}
    out["buffers"] = dict(engine.model.named_buffers())
    engine.close()
    assert nn.functional.linear is torch._C._nn.linear, "the engine is gone, and so are its patches"
    return out


def run_all(groups: dict[str, dict[str, Spec]]) -> dict[str, dict[str, Any]]:
    logging.disable(logging.INFO)
    if distributed.launched():
        # The deepspeed launcher sets this, which enables collectives in shared memory.
        os.environ["LOCAL_SIZE"] = os.environ["WORLD_SIZE"]
    out = {
        kind: {name: run(spec, NAN_STEP if kind == "nan" else None) for name, spec in specs.items()}
        for kind, specs in groups.items()
    }
    if distributed.launched():
        out["left in shared memory"] = dict.fromkeys(
            p.name for p in Path("/dev/shm").glob(f"*_{os.environ['MASTER_PORT']}_*")
        )
    return out


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return plain(STEPS)


@pytest.fixture(scope="module")
def two() -> dict[str, dict[str, Any]]:
    return run_ranks(run_all, 2, ALL, timeout=240)[0]


@pytest.mark.parametrize("name", FP32)
def test_fp32_training_is_that_of_plain_torch(
    name: str, two: dict[str, dict[str, Any]], reference: dict[str, Any]
) -> None:
    result = two["fp32"][name]
    assert relative(result["loss"], reference["loss"]) < 1e-6
    assert relative(result["norm"], reference["norm"]) < 1e-5
    assert min(reference["norm"]) > 0.4, "clipping must be active for this comparison to mean something"
    assert all(result["applied"]) and result["steps"] == STEPS
    # Adam divides by the root of the second moment, which amplifies the rounding of a tiny gradient.
    assert distance(result["params"], reference["params"]) < 2e-5
    assert distance(result["ema"], reference["ema"]) < 2e-5


@pytest.mark.parametrize("kind,name", [(kind, name) for kind, specs in ALL.items() for name in specs])
def test_average_of_shards_is_the_average_of_whole_tensors(
    kind: str, name: str, two: dict[str, dict[str, Any]]
) -> None:
    result = two[kind][name]
    assert distance(result["ema"], result["start"]) > 1e-2, "the average has moved"
    assert distance(result["ema"], result["params"]) > 1e-3, "and is not the weights"
    assert distance(result["ema"], result["whole average"]) < 1e-6


@pytest.mark.parametrize("name", BF16)
def test_bf16_training_stays_close_and_keeps_fp32_state(
    name: str, two: dict[str, dict[str, Any]], reference: dict[str, Any]
) -> None:
    result = two["bf16"][name]
    error = relative(result["loss"], reference["loss"])
    assert 1e-6 < error < 2e-3
    initial = {key: param.detach() for key, param in TinyModel().named_parameters()}
    assert distance(result["start"], initial) == 0.0, "master weights start from the unrounded weights"
    assert all(torch.equal(b, TinyModel().position) for k, b in result["buffers"].items() if "position" in k)
    rounded = {key: value.bfloat16().float() for key, value in result["params"].items()}
    assert distance(result["params"], rounded) > 0, "master weights are not rounded"


@pytest.mark.parametrize("name", NAN)
def test_all_ranks_skip_a_step_that_is_not_finite(name: str, two: dict[str, dict[str, Any]]) -> None:
    result = two["nan"][name]
    expected = plain(STEPS, nan_step=NAN_STEP)
    assert [i for i, applied in enumerate(result["applied"]) if not applied] == [NAN_STEP]
    assert result["steps"] == STEPS - 1
    assert not math.isfinite(result["norm"][NAN_STEP])
    assert relative(plain(STEPS)["loss"], expected["loss"]) > 2e-2, "the skipped step must make a difference"
    assert relative(result["loss"], expected["loss"]) < (4e-3 if NAN[name].options.get("precision") == "bf16" else 1e-6)


@pytest.mark.parametrize("kind,name", [("fp32", n) for n in FP32] + [("bf16", n) for n in BF16])
def test_averages_can_be_evaluated_and_put_back(kind: str, name: str, two: dict[str, dict[str, Any]]) -> None:
    result = two[kind][name]
    assert distance(result["swapped"], result["ema"]) == 0.0
    assert distance(result["restored"], result["params"]) == 0.0
    model = TinyModel()
    model.load_state_dict(result["ema"], strict=False)
    expected = model(torch.ones(2, 8)).detach()
    tolerance = 1e-6 if kind == "fp32" else 3e-2
    assert (result["averaged output"] - expected).abs().max() < tolerance


def test_no_shared_memory_is_left(two: dict[str, dict[str, Any]]) -> None:
    assert two["left in shared memory"] == {}


def test_one_process_needs_no_launcher(reference: dict[str, Any]) -> None:
    results = run_alone(run_all, {"fp32": ALONE})["fp32"]
    for result in results.values():
        assert relative(result["loss"], reference["loss"]) < 1e-6
        assert result["describe"]["world_size"] == 1


def _hybrid() -> list[dict[str, Any]]:
    specs = [
        Spec("fsdp", {"sharding": "hybrid", "shard_size": 2}),
        Spec("deepspeed", {"zero_stage": 3, "persistent_elements": 0}, 2),
        Spec("deepspeed", {"zero_stage": 1}),
    ]
    return [run(spec, None) for spec in specs]


@pytest.mark.full
def test_four_ranks_and_hybrid_sharding(reference: dict[str, Any]) -> None:
    for result in run_ranks(_hybrid, 4, timeout=240)[0]:
        assert relative(result["loss"], reference["loss"]) < 1e-6
        assert distance(result["ema"], reference["ema"]) < 2e-5


def _hpz() -> list[float]:
    # ZeRO++: the backward pass gathers from a second copy of the weights, here on both ranks of the node.
    spec = Spec("deepspeed", {"zero_stage": 3, "persistent_elements": 0, "hpz_partition_size": 2}, 2)
    engine = make_engine(spec)
    return train(engine, make_ema(engine), range(STEPS), 2)["loss"]


@pytest.mark.full
def test_hpz_trains_the_same(reference: dict[str, Any]) -> None:
    for losses in run_ranks(_hpz, 2, timeout=400):
        assert relative(losses, reference["loss"]) < 1e-6


def _compiled() -> list[dict[str, Any]]:
    options = {"compile": True, "activation_checkpointing": "block"}
    specs = [Spec("fsdp", options), Spec("deepspeed", {"zero_stage": 1, **options})]
    return [run(spec, None) for spec in specs]


@pytest.mark.full
def test_compiled_blocks(reference: dict[str, Any]) -> None:
    for result in run_ranks(_compiled, 2, timeout=400)[0]:
        assert relative(result["loss"], reference["loss"]) < 2e-6


# ---------------------------------------------------------------------------------------------- refusals


class _Timed(TinyModel):
    """Records the times of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.seen.append(t)
        return super().forward(x)


def _times(name: str) -> list[torch.Tensor]:
    model = _Timed()
    seen = model.seen
    engine = make_engine(BF16[name], model)
    engine.model(torch.ones(2, 8), torch.tensor([0.7001, 0.7002]))
    engine.close()
    return seen


@pytest.mark.parametrize("name", BF16)
def test_bf16_engines_do_not_round_the_times(name: str) -> None:
    """bf16 would round both times to 0.6992, which makes the error of the loss eight times as large."""
    (times,) = run_alone(_times, name)
    assert times.dtype == torch.float32 and times.tolist() == pytest.approx([0.7001, 0.7002], rel=1e-6)


def _dtypes_in_forward() -> dict[str, torch.dtype]:
    model = agreement.make_model()
    seen: dict[str, torch.dtype] = {}

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: seen.update({f"{name}.weight": module.weight.dtype})

    for name, module in model.named_modules():
        if isinstance(module, RMSNorm | nn.Embedding | nn.Linear):
            module.register_forward_pre_hook(note(name))
    engine = make_engine(Spec("fsdp", {"precision": "bf16"}), model)
    engine.backward(agreement.objective()(engine.model, agreement.batch(0)).total, last=True)
    assert engine.step(1e-3).applied
    engine.close()
    return seen


def test_norms_and_labels_stay_float32_in_forward_under_fsdp_in_bf16() -> None:
    for seen in run_ranks(_dtypes_in_forward, 2):
        kept = {name for name, dtype in seen.items() if dtype == torch.float32}
        assert kept == {name for name in seen if "norm" in name or "embedding_table" in name}
        assert 0 < len(kept) < len(seen)


def _norms_of_accumulated_gradients() -> list[float]:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(self.w.dtype) * self.w

    engine = make_engine(Spec("deepspeed", {"zero_stage": 1, "precision": "bf16", "grad_clip": None}), One())
    norms = []
    for gradients in ([1.0] + 4 * [2.0**-9], [1.0] + 4 * [2.0**-9], [0.5]):
        for micro, gradient in enumerate(gradients):
            loss = engine.model(torch.tensor([gradient])).sum().float()
            engine.backward(loss, last=micro == len(gradients) - 1)
        norms.append(engine.step(0.0).grad_norm)
    engine.close()
    return norms


def test_zero1_adds_micro_batches_up_in_float32() -> None:
    # In bf16 the sum of 1 and 2⁻⁹ is 1.
    assert run_alone(_norms_of_accumulated_gradients) == [1 + 2**-7, 1 + 2**-7, 0.5]


def _different() -> None:
    make_engine(Spec("fsdp"), TinyModel(seed=distributed.rank()))


def test_ranks_with_different_weights_are_refused() -> None:
    with pytest.raises(RankError, match="initial weights differ"):
        run_ranks(_different, 2)


@pytest.mark.parametrize(
    "options,field",
    [
        ({"zero_stage": 0, "precision": "bf16"}, "zero_stage: 0"),
        ({"zero_stage": 0, "precision": "fp32", "offload_optimizer": True}, "offload_optimizer: true"),
        ({"zero_stage": 2, "offload_optimizer": True, "offload_params": True}, "offload_params: true"),
        ({"zero_stage": 1, "overlap_comm": True}, "overlap_comm: true"),
        ({"zero_stage": 3, "compile": True}, "compile: true"),
        ({"zero_stage": 3, "activation_checkpointing": "selective"}, "activation_checkpointing: selective"),
        ({"zero_stage": 2, "hpz_partition_size": 8}, "hpz_partition_size: 8"),
        ({"grad_clip": 0.0}, "grad_clip: 0.0"),
    ],
)
def test_deepspeed_settings_that_contradict_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        DeepSpeedConfig(**options)


def test_deepspeed_knows_every_key_of_our_configuration_and_refuses_others() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    stage3 = {"zero_stage": 3, "offload_optimizer": True, "offload_params": True, "hpz_partition_size": 4}
    for options in ({"zero_stage": 1}, {"zero_stage": 2, "overlap_comm": True}, stage3):
        given = deepspeed_json(DeepSpeedConfig(**options))["zero_optimization"]
        known = DeepSpeedZeroConfig(**given).model_dump()
        assert known["stage"] == options["zero_stage"]
        assert known["zero_hpz_partition_size"] == options.get("hpz_partition_size", 1)
    with pytest.raises(ValueError, match="zero_hpz_size"):
        DeepSpeedZeroConfig(**given, zero_hpz_size=2)


def test_fsdp_settings_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match="shard_size: 2"):
        FSDPConfig(shard_size=2)


def test_deepspeed_clips_gradients_only_with_grad_clip() -> None:
    # DeepSpeed clips at 1.0 by default.
    assert deepspeed_json(DeepSpeedConfig())["gradient_clipping"] == 0.0
    assert deepspeed_json(DeepSpeedConfig(grad_clip=0.5))["gradient_clipping"] == 0.5


def test_self_check_notices_holes_and_overlaps() -> None:
    def fragment(start: int, stop: int) -> Fragment:
        data = torch.zeros(stop - start)
        return Fragment("w", (4, 5), start, data, data, data, True)

    check_fragments([fragment(0, 7), fragment(7, 20)], {"w": (4, 5)})
    for parts in ([(0, 7), (8, 20)], [(0, 7), (6, 20)], [(0, 7)], [(1, 20)], []):
        with pytest.raises(RuntimeError, match="self-check"):
            check_fragments([fragment(*part) for part in parts], {"w": (4, 5)})
