"""The time model: closed forms of its parts, properties that hold on any machine, and sizes that are known."""

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sfd_scale import plan as plans
from sfd_scale.config import load
from sfd_scale.engines.deepspeed import DeepSpeedConfig
from sfd_scale.engines.fsdp import FSDPConfig
from sfd_scale.planning import collectives as links
from sfd_scale.planning.calibration import MeasuredStep, calibrate
from sfd_scale.planning.collectives import Collective, Group
from sfd_scale.planning.costs import AnyEngineConfig, bytes_sent_per_step, collectives
from sfd_scale.planning.efficiency import Efficiency
from sfd_scale.planning.goodput import goodput
from sfd_scale.planning.hardware import GPUS, Hardware, read_gpu_spec
from sfd_scale.planning.kernels import attention_seconds, elementwise_seconds, matmul_seconds
from sfd_scale.planning.step_time import Step, StepTime, launches, step_time
from sfd_scale.recipe import TrainRecipe
from sfd_scale.runtime.batch_split import BatchSplit
from sfd_scale.runtime.device import peak_flops_by_name

H100, H200 = GPUS["h100"], GPUS["h200"]
USUAL = Efficiency()
ENGINES: list[AnyEngineConfig] = [
    DeepSpeedConfig(zero_stage=1),
    DeepSpeedConfig(zero_stage=2, overlap_comm=False),
    DeepSpeedConfig(zero_stage=2, overlap_comm=True, compile=True),
    DeepSpeedConfig(zero_stage=3, overlap_comm=True),
    FSDPConfig(reshard_after_forward=True),
    FSDPConfig(compile=True, activation_checkpointing="block"),
    FSDPConfig(compile=True, reshard_after_forward=False),
    FSDPConfig(sharding="hybrid", compile=True),
    FSDPConfig(sharding="replicate", compile=True),
]
XXL = plans.count_model(load("train/sfd_xxl", TrainRecipe))


def step(engine: AnyEngineConfig, ranks: int = 8, micro_batch: int = 32, accumulation: int = 1) -> Step:
    split = BatchSplit(micro_batch, accumulation, ranks)
    return Step(XXL.footprint, XXL.work, engine, split, ranks_per_node=min(8, ranks))


def timed(found: Step, hardware: Hardware = H200, efficiency: Efficiency = USUAL) -> StepTime:
    return step_time(found, hardware, efficiency)


def test_the_work_of_a_block_of_xxl_is_what_torch_runs() -> None:
    # Dispatched operations without views, counted on one block: 71 forward, 125 backward with the sums of gradients.
    work = XXL.work
    assert work.blocks == 24
    assert work.launches(backward=False, in_block=True) == 24 * 71
    assert work.launches(backward=True, in_block=True) == 24 * 125
    # FlopCounterMode counts attention too: 12·T²·D for each block, and two more matmuls in the flash backward pass.
    attention = 24 * 12 * 256**2 * 1536
    assert work.matmul_flops(1) + attention == pytest.approx(XXL.flops, rel=0.01)


def test_512_pixels_are_1024_tokens_of_work() -> None:
    small = load("train/sfd_xl", TrainRecipe)
    large = load("train/sfd_xl", TrainRecipe, ["latents.size=32", "tokenizer.vision.image_size=512"])
    first, second = (plans.count_model(recipe) for recipe in (small, large))
    tokens = {op.fixed[1] for op, _ in second.work.operations if op.kind == "attention"}
    assert tokens == {1024}
    assert second.work.elementwise_bytes(8, in_block=True) / first.work.elementwise_bytes(8, in_block=True) == (
        pytest.approx(4, rel=0.02)
    )
    # Four times the matmuls, sixteen times the attention.
    assert 4.0 < second.flops / first.flops < 4.6


def test_a_large_matmul_reaches_the_sustained_rate_and_a_small_one_waits_for_its_wave() -> None:
    large = matmul_seconds((1, 2**14, 2**14, 2**14), "bf16", H100, USUAL)
    assert 2 * 2.0**42 / large == pytest.approx(H100.peak_bf16 * USUAL.matmul.value, rel=0.05)
    # 12 × 11 tiles fill the 132 processors. One more column of outputs starts a second wave of tiles, or smaller tiles.
    full, more = (matmul_seconds((1, 3072, columns, 2048), "bf16", H100, USUAL) for columns in (1408, 1409))
    assert 1.1 < more / full <= 2.0


def test_a_matmul_of_one_row_is_bound_by_memory() -> None:
    seconds = matmul_seconds((1, 1, 8192, 8192), "bf16", H100, USUAL)
    assert seconds == pytest.approx(2 * (8192 + 8192**2 + 8192) / (H100.bandwidth * USUAL.memory.value))


SHAPE = st.tuples(*[st.integers(1, 4)], *[st.integers(1, 20_000)] * 3)


@given(SHAPE, st.sampled_from(sorted(GPUS)), st.sampled_from(["bf16", "tf32", "fp32"]))
@settings(max_examples=100, deadline=None)
def test_no_matmul_is_faster_than_the_peak_or_the_memory(shape: tuple[int, ...], gpu: str, precision: str) -> None:
    hardware = GPUS[gpu]
    seconds = matmul_seconds(shape, precision, hardware, USUAL)
    assert 2.0 * math.prod(shape) / seconds <= hardware.peak(precision)
    assert shape[0] * shape[2] * shape[3] * 2 / seconds <= hardware.bandwidth


@given(st.integers(1, 4096), st.integers(1, 8192), st.integers(1, 8192), st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_half_of_a_matmul_takes_at_least_half_its_time(m: int, n: int, k: int, axis: int) -> None:
    whole = [2 * m if axis == 0 else m, 2 * n if axis == 1 else n, 2 * k if axis == 2 else k]
    slow, fast = (matmul_seconds((1, *shape), "bf16", H100, USUAL) for shape in (whole, [m, n, k]))
    assert fast <= slow * (1 + 1e-9) and fast >= slow / 2 * (1 - 1e-9)


def test_attention_pads_the_features_of_a_head_to_32() -> None:
    times = [attention_seconds((512, 256, 256, f), False, "bf16", H100, USUAL) for f in (64, 72, 96)]
    assert times[0] < times[1] == times[2]
    forward, backward = (attention_seconds((512, 4096, 4096, 64), b, "bf16", H100, USUAL) for b in (False, True))
    assert backward == pytest.approx(2.5 * forward)
    assert elementwise_seconds(1e9, 1, H100, USUAL) == pytest.approx(1e9 / (H100.bandwidth * USUAL.memory.value))


@given(
    st.sampled_from(["all_gather", "reduce_scatter", "all_reduce"]),
    st.integers(1, 9).map(lambda n: 2**n),
    st.sampled_from([1, 2, 8]),
    st.floats(1e3, 1e12),
    st.integers(1, 100),
)
@settings(max_examples=200, deadline=None)
def test_no_rank_sends_faster_than_its_links(kind: Any, ranks: int, stride: int, size: float, calls: int) -> None:
    group = Group(ranks, 8, stride)
    found = Collective(kind, "step", size, calls, group, False)
    seconds = links.seconds(found, H100, USUAL)
    assert found.bytes_sent / seconds <= H100.nvlink
    if group.nodes > 1:
        # Through the cards of a node goes what its ranks do not have among themselves.
        through = size * (group.nodes - 1) / group.nodes
        assert through / seconds <= group.per_node * H100.network
    # The formula of a ring, and never faster with slower links or more ranks.
    turns = 2 if kind == "all_reduce" else 1
    assert found.bytes_sent == pytest.approx(turns * size * (ranks - 1) / ranks)
    slower = replace(H100, nvlink=H100.nvlink / 2, network=H100.network / 2)
    assert links.seconds(found, slower, USUAL) > seconds
    larger = replace(found, group=replace(group, size=2 * ranks))
    assert larger.bytes_sent > found.bytes_sent and links.seconds(larger, H100, USUAL) > seconds


@given(st.integers(1, 9).map(lambda n: 2**n), st.floats(1e3, 1e12), st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_no_rank_of_an_all_to_all_sends_faster_than_its_links(ranks: int, size: float, calls: int) -> None:
    found = Collective("all_to_all", "step", size, calls, Group(ranks, 8), False)
    seconds = links.seconds(found, H100, USUAL)
    assert found.bytes_sent == pytest.approx(size / ranks * (ranks - 1) / ranks)
    assert found.bytes_sent / seconds <= H100.nvlink
    inside = min(ranks, 8)
    assert found.bytes_sent * (ranks - inside) / max(ranks - 1, 1) / seconds <= H100.network
    slower = replace(H100, nvlink=H100.nvlink / 2, network=H100.network / 2)
    assert links.seconds(found, slower, USUAL) > seconds


def test_a_ring_of_one_node_sends_at_the_speed_of_nvlink() -> None:
    found = Collective("all_gather", "forward", 8e9, 1, Group(8, 8), True)
    seconds = links.seconds(found, H100, USUAL)
    assert seconds == pytest.approx(7e9 / (450e9 * 0.8) + 7 * 2e-6 + 20e-6)
    # Two nodes share eight network cards of 50 GB/s; ranks of equal index have one each.
    assert links.link_bandwidth(Group(16, 8), H100) == 8 * 50e9
    assert links.link_bandwidth(Group(2, 8, stride=8), H100) == 50e9
    assert links.link_bandwidth(Group(2, 8, stride=4), H100) == 450e9


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_the_bytes_of_the_collectives_are_those_that_a_rank_sends(engine: AnyEngineConfig) -> None:
    found = collectives(XXL.footprint, engine, ranks=64, ranks_per_node=8, grad_accum_steps=2)
    sent = bytes_sent_per_step(XXL.footprint, engine, ranks=64, ranks_per_node=8, grad_accum_steps=2)
    assert sum(collective.bytes_sent for collective in found) == pytest.approx(sent) and sent > 0
    seconds = sum(links.seconds(collective, H200, USUAL) for collective in found)
    assert sent / seconds < H200.nvlink


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_properties_of_a_step_hold_for_every_engine(engine: AnyEngineConfig) -> None:
    for ranks, micro in ((1, 16), (8, 16), (16, 8), (64, 2)):
        whole = timed(step(engine, ranks, micro))
        assert all(seconds >= 0 for _, seconds in whole.parts)
        assert micro * XXL.flops / whole.total < H200.peak_bf16
        for change in ("bandwidth", "nvlink", "network", "peak_bf16"):
            slower = replace(H200, **{change: getattr(H200, change) / 2})
            assert timed(step(engine, ranks, micro), slower).total >= whole.total - 1e-12, change
        # Twice the ranks with half the samples each: at most twice as fast, and never more communication hidden.
        if ranks > 1 and micro > 1:
            double = timed(step(engine, 2 * ranks, micro // 2))
            assert double.total >= whole.total / 2 * (1 - 1e-9)
        # Twice the samples take longer, and less than twice as long.
        more = timed(step(engine, ranks, 2 * micro))
        assert whole.total < more.total <= 2 * whole.total
        # Accumulation saves no time beside the larger micro-batch.
        assert timed(step(engine, ranks, micro, 2)).total >= more.total * (1 - 1e-9)


@given(st.sampled_from(ENGINES), st.integers(0, 6), st.integers(1, 64), st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_faster_hardware_is_never_slower(engine: AnyEngineConfig, power: int, micro: int, factor: float) -> None:
    assume(factor >= 1)
    found = step(engine, 2**power, micro)
    fast = replace(
        H200, bandwidth=H200.bandwidth * factor, nvlink=H200.nvlink * factor, network=H200.network * factor,
        peak_bf16=H200.peak_bf16 * factor,
    )  # fmt: skip
    assert timed(found, fast).total <= timed(found).total * (1 + 1e-9)


def test_overlap_compile_and_checkpointing_act_as_they_should() -> None:
    def total(engine: AnyEngineConfig, **options: Any) -> StepTime:
        return timed(step(engine, **options))

    late, early = (DeepSpeedConfig(zero_stage=2, compile=True, overlap_comm=overlap) for overlap in (False, True))
    assert total(early).communication < 0.7 * total(late).communication
    assert total(FSDPConfig(compile=True)).elementwise < 0.3 * total(FSDPConfig()).elementwise
    assert launches(step(FSDPConfig(compile=True)), USUAL) < 0.5 * launches(step(FSDPConfig()), USUAL)
    plain, block = (FSDPConfig(compile=True, activation_checkpointing=mode) for mode in ("none", "block"))
    assert 1.2 < total(block).matmul / total(plain).matmul < 1.4
    selective = total(FSDPConfig(compile=True, activation_checkpointing="selective"))
    assert selective.matmul == total(plain).matmul and selective.elementwise > total(plain).elementwise
    kept = total(FSDPConfig(compile=True, reshard_after_forward=False))
    assert kept.communication < total(plain).communication
    workers, alone = replace(step(plain), num_workers=4), step(plain)
    assert timed(workers).data < timed(alone).data
    # A step of 32 samples reads them alone; four workers share them, and have the rest of the step for it.
    slow = replace(USUAL, read=replace(USUAL.read, value=1.0))
    one, four = (timed(found, efficiency=slow) for found in (alone, workers))
    assert one.data - 32 * USUAL.draw.value == pytest.approx(32.0)
    assert four.data - 32 * USUAL.draw.value == pytest.approx(32 / 4 - (four.total - four.data))


def test_fewer_units_take_less_of_the_host() -> None:
    # 24 blocks of XXL and the rest are 25, 13 and 7 units. Without a device beside it, all of the host's time counts.
    one, auto, four = (
        timed(step(FSDPConfig(compile=True, blocks_per_unit=n)), replace(H200, asynchronous=False)).host
        for n in (1, "auto", 4)  # type: ignore[arg-type]
    )
    spared = USUAL.hook_unit.value * (USUAL.hook_fsdp.value + USUAL.hook_reshard.value)
    assert one - auto == pytest.approx(12 * spared) and one - four == pytest.approx(18 * spared)


def test_flat_parameters_cost_a_copy_and_spare_the_host() -> None:
    whole, flat = (
        timed(step(FSDPConfig(compile=True, flat_parameters=wanted)), replace(H200, asynchronous=False))
        for wanted in ("auto", True)  # type: ignore[arg-type]
    )
    # The gradients of 24 blocks of 42.5M weights are read and written once more, in bf16.
    copied = 4 * sum(XXL.footprint.block_elements) / (H200.bandwidth * USUAL.memory.value)
    assert flat.copies - whole.copies == pytest.approx(copied)
    units = (1 - USUAL.hook_unit.value) * 25 + USUAL.hook_unit.value * 13
    hooks = units * (USUAL.hook_fsdp.value + USUAL.hook_reshard.value)
    assert whole.host - flat.host == pytest.approx((1 - USUAL.hook_flat.value) * hooks)


def test_xxl_on_8_h200_takes_what_a_roofline_by_hand_gives() -> None:
    # By hand: matmuls at 700 TFLOP/s 47.8 ms, attention 5.5; at 4 TB/s elementwise 14.8, copies 3.6, optimizer 1.4.
    constants = replace(
        USUAL, matmul=replace(USUAL.matmul, value=700 / 989), memory=replace(USUAL.memory, value=4 / 4.8)
    )
    found = timed(step(FSDPConfig(compile=True)), efficiency=constants)
    assert found.matmul == pytest.approx(0.0478, rel=0.1)
    assert found.attention == pytest.approx(0.0055, rel=0.1)
    assert found.elementwise == pytest.approx(0.0148, rel=0.1)
    assert found.copies == pytest.approx(0.0036, rel=0.1)
    assert found.optimizer == pytest.approx(0.0014, rel=0.1)
    assert found.bound == "matmul"


def test_few_samples_on_many_gpus_are_bound_by_the_host_or_communication() -> None:
    found = timed(step(DeepSpeedConfig(zero_stage=2, overlap_comm=False), ranks=64, micro_batch=4))
    assert found.bound == "host"
    ideal = 4 * XXL.flops / (0.4 * H200.peak_bf16)
    assert 7 < found.total / ideal < 12


def test_a_calibration_finds_the_constants_of_the_measured_machine() -> None:
    true = replace(
        USUAL, matmul=replace(USUAL.matmul, value=0.8), memory=replace(USUAL.memory, value=0.45),
        launch=replace(USUAL.launch, value=30e-6),
    )  # fmt: skip
    steps = [step(FSDPConfig(compile=c, sharding="replicate"), 1, m) for c in (True, False) for m in (1, 4, 16, 64)]
    measured = [MeasuredStep("", entry, timed(entry, efficiency=true).total) for entry in steps]
    found = calibrate(measured, H200, USUAL, "a test")
    assert statistics.median(abs(ratio - 1) for ratio in found.before) > 0.1
    assert max(abs(ratio - 1) for ratio in found.after) < 0.05
    for name in ("matmul", "memory", "launch"):
        fitted = getattr(found.efficiency, name)
        assert fitted.value == pytest.approx(getattr(true, name).value, rel=0.15), name
        assert (fitted.source, fitted.reference) == ("measured here", "a test")
    # An untouched constant keeps its source.
    assert found.efficiency.attention == USUAL.attention


def test_unfused_attention_has_the_matrix_of_all_pairs() -> None:
    recipe = load("train/sfd_xl", TrainRecipe, ["attention=math"])
    kinds = {operation.kind for operation, _ in plans.count_model(recipe).work.operations}
    assert kinds == {"matmul", "elementwise"}


def test_goodput_falls_with_failures_and_with_saves() -> None:
    few = goodput(ranks=8, save_every_s=600, save_s=1, restart_s=600)
    many = goodput(ranks=16_384, save_every_s=600, save_s=1, restart_s=600)
    assert many.hours_between_failures == pytest.approx(50_700 / 16_384)
    assert many.useful < few.useful < 1
    for found in (few, many):
        assert found.useful + found.saving + found.lost == pytest.approx(1)
    # By hand: a failure each 3.09 h loses 300 s of steps and 600 s of restart.
    assert many.lost == pytest.approx(900.5 / (3.0945 * 3600 + 900.5), rel=1e-3)
    # Of an interval of 601 s, one second goes to the save.
    slow = goodput(ranks=8, save_every_s=600, save_s=150, restart_s=600)
    assert few.saving / few.useful == pytest.approx(1 / 600) and slow.saving == pytest.approx(150 / 750, rel=1e-3)


def test_the_table_of_gpus_agrees_with_the_peaks_of_a_run() -> None:
    for name, gpu in GPUS.items():
        assert peak_flops_by_name(f"NVIDIA {gpu.device}") == gpu.peak_bf16, name


def test_a_gpu_can_be_described_by_a_file(tmp_path: Any) -> None:
    file = tmp_path / "gpu.yaml"
    file.write_text(
        "device: X1\nmemory: 1.0e11\npeak_bf16: 5.0e14\npeak_tf32: 2.5e14\npeak_fp32: 5.0e13\nbandwidth: 3e+12\n"
        "processors: 100\nnvlink: 2.0e11\n"
    )
    found = read_gpu_spec(file)
    assert (found.device, found.processors, found.network) == ("X1", 100, 50e9)
    file.write_text("device: X1\n")
    with pytest.raises(ValueError, match=r"--gpu-spec: .* has \['device'\]; required: device, memory, peak_bf16"):
        read_gpu_spec(file)
    file.write_text(": [")
    with pytest.raises(ValueError, match="--gpu-spec: .*not readable as settings: line 1: "):
        read_gpu_spec(file)
