"""Plans as tables, for people."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sfd_scale.planning.costs import engine_name
from sfd_scale.planning.efficiency import Efficiency, Quantity
from sfd_scale.planning.hardware import Hardware
from sfd_scale.planning.planner import Plan, PlannedRun
from sfd_scale.planning.step_time import StepTime

_GIB = 2**30
# What takes the time, in words, for "bound by".
BOUND = {
    "matmul": "matmuls", "attention": "attention", "elementwise": "elementwise operations (GPU memory)",
    "copies": "copies of the engine", "optimizer": "optimizer and EMA", "communication": "communication",
    "host": "the host, which launches kernels", "data": "reading data",
}  # fmt: skip

# Where the constants of each part come from.
SOURCES = {
    "matmul": "maker's peak, measured elsewhere", "attention": "maker's peak, measured elsewhere",
    "elementwise": "maker's bandwidth, counted here", "copies": "maker's bandwidth, computed",
    "optimizer": "maker's bandwidth, computed", "communication": "maker's links; network assumed",
    "host": "measured here on a CPU, scaled", "data": "measured here on a CPU, scaled",
}  # fmt: skip


def quantities(made: Plan, hardware: Hardware) -> list[tuple[str, str, str]]:
    """The plan as rows of (name, value, source)."""
    return [*_memory_rows(made, hardware), *_size_rows(made), *_time_rows(made)]


def _memory_rows(made: Plan, hardware: Hardware) -> list[tuple[str, str, str]]:
    memory = made.memory
    checked = "computed, checked on the engines"
    rows = [
        (name, f"{getattr(memory, name) / _GIB:.2f} GiB", checked)
        for name in ("params", "gradients", "optimizer", "ema")
    ]
    rows += [("buffers", f"{memory.buffers / _GIB:.2f} GiB", "computed, not checked on a GPU")]
    rows += [("activations", f"{memory.activations / _GIB:.2f} GiB", "traced on the model, eager")]
    if memory.update:
        text = f"{memory.update / _GIB:.2f} GiB, after the activations are freed"
        rows += [("update by Muon", text, "computed, checked on a CPU")]
    share = memory.total / hardware.memory
    total = f"{memory.total / _GIB:.2f} GiB, {share:.0%} of {hardware.memory / 1e9:.0f} GB"
    rows += [("memory of the fullest rank", total, "")]
    if memory.host:
        rows += [("host memory per rank", f"{memory.host / _GIB:.2f} GiB", checked)]
    return rows


def _size_rows(made: Plan) -> list[tuple[str, str, str]]:
    split, engine = made.split, made.engine
    largest = str(made.largest_micro_batch) if made.largest_micro_batch else "none: not one sample fits"
    rate = made.bytes_sent_per_step / made.step_seconds
    share = made.optimizer_flops / made.flops_per_step
    muon = [("FLOPs of Muon per step", f"{made.optimizer_flops:.3g}, {share:.1%} of these; not in the MFU", "counted")]
    return [
        ("micro-batch × accumulation", f"{split.micro_batch} × {split.grad_accum_steps} × {split.world_size} ranks",
         "the recipe"),
        ("largest micro-batch that fits", largest, ""),
        ("torch.compile, checkpointing", f"{'on' if engine.compile else 'off'}, {engine.activation_checkpointing}",
         "the recipe"),
        ("checkpoint", f"{made.checkpoint / 1e9:.1f} GB, kept {made.checkpoints / 1e9:.1f} GB", "computed"),
        ("data", f"{made.data / 1e9:.1f} GB", "computed, or the shards"),
        ("FLOPs per step", f"{made.flops_per_step:.3g}", "counted on the model"),
        *(muon if made.optimizer_flops else []),
        ("sent per step by each rank", f"{made.bytes_sent_per_step / 1e9:.2f} GB, {rate / 1e9:.0f} GB/s",
         "computed, ring collectives"),
    ]  # fmt: skip


def _time_rows(made: Plan) -> list[tuple[str, str, str]]:
    rows = []
    if made.time is not None:
        rows = [
            (f"  {BOUND[name]}", f"{1000 * seconds:.1f} ms, {seconds / made.time.total:.0%}", SOURCES[name])
            for name, seconds in made.time.parts
            if seconds > 0.0005 * made.time.total
        ]
    peak = f"{made.mfu:.1%} of {made.peak_flops / 1e12:,.0f} TFLOP/s (MFU)"
    bound = "stated MFU" if made.time is None else BOUND[made.time.bound]
    source = "given" if made.time is None else "sum of the parts"
    lost = made.goodput
    return [
        ("step", f"{made.step_seconds:.3f} s, {peak}", source), *rows, ("bound by", bound, ""),
        ("whole run", f"{made.days:.1f} days, {made.gpu_hours:,.0f} GPU-hours", ""),
        ("goodput", f"{lost.useful:.1%}; a failure every {lost.hours_between_failures:,.0f} h; with failures "
         f"{made.days_with_failures:.1f} days", "measured elsewhere: arXiv 2407.21783"),
    ]  # fmt: skip


def constants(efficiency: Efficiency, hardware: Hardware) -> list[tuple[str, str, str, str]]:
    """Every constant of the time as rows of (name, value, source, reference)."""
    sheet = [
        ("peak of matmuls in bf16", hardware.peak_bf16 / 1e12, "TFLOP/s", "maker's"),
        ("GPU memory", hardware.memory / 1e9, "GB", "maker's"),
        ("bandwidth of GPU memory", hardware.bandwidth / 1e9, "GB/s", "maker's"),
        ("processors", hardware.processors, "", "maker's"),
        ("link within a node", hardware.nvlink / 1e9, "GB/s per GPU and direction", "maker's"),
        ("network between nodes", hardware.network / 1e9, "GB/s per GPU and direction", "assumed"),
        ("link to the host", hardware.pcie / 1e9, "GB/s", "maker's"),
    ]
    rows = [(name, f"{value:,.4g} {unit}".strip(), source, hardware.device) for name, value, unit, source in sheet]
    return rows + [(name, _value(q), q.source, q.reference) for name, q in efficiency.rows()]


def _value(quantity: Quantity) -> str:
    value, unit = quantity.value, quantity.unit
    if unit == "s" and value < 0.1:
        return f"{1e6 * value:,.4g} µs" if value < 1e-3 else f"{1e3 * value:,.4g} ms"
    return f"{value:,.4g} {unit}".strip()


def table_row(recipe: str, job: PlannedRun, made: Plan) -> list[str]:
    """One line of the table that compares engines and numbers of GPUs; see `TABLE_HEAD`."""
    memory = made.memory
    parts = [memory.params, memory.gradients, memory.optimizer, memory.ema, memory.buffers, memory.activations]
    return [
        recipe, engine_name(made.engine), str(job.ranks), f"{made.split.micro_batch} × {made.split.grad_accum_steps}",
        *[f"{part / _GIB:.2f}" for part in parts], f"{memory.total / _GIB:.1f}", str(made.largest_micro_batch),
        f"{made.bytes_sent_per_step / 1e9:.2f}", f"{made.step_seconds:.3f}", f"{made.mfu:.0%}", bound_by(made.time),
        f"{made.days:.1f}", f"{made.gpu_hours:,.0f}",
    ]  # fmt: skip


def bound_by(time: StepTime | None) -> str:
    """The longest part of a step with its share."""
    return "stated MFU" if time is None else f"{time.bound} {dict(time.parts)[time.bound] / time.total:.0%}"


TABLE_HEAD = (
    "recipe", "engine", "GPUs", "micro-batch × accumulation", "params", "gradients", "optimizer", "EMA", "buffers",
    "activations", "GiB a rank", "largest micro-batch", "GB sent a step", "s a step", "MFU", "bound by", "days",
    "GPU-hours",
)  # fmt: skip


def markdown(rows: Sequence[Sequence[str]], head: Sequence[str] = TABLE_HEAD) -> str:
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def html(rows: Sequence[Sequence[str]], head: Sequence[str] = TABLE_HEAD, title: str = "Plans") -> str:
    """The table as a page."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "\n".join([line("th", head), *(line("td", row) for row in rows)])
    style = "table{border-collapse:collapse;font:14px sans-serif}td,th{border:1px solid #ccc;padding:4px 8px}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{style}</style></head>\n<body><h1>{escape(title)}</h1>\n<table>\n{body}\n</table></body></html>\n"
    )
