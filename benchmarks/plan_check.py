"""`python -m benchmarks.plan_check`: the time model of `sfd plan` beside public measurements and a real CPU run.

The constants of the model are fitted to one half of the public measurements (`--fit` repeats it); the other half is
held out. `--cpu` times steps of small models on this machine, fits the CPU's constants to some, and predicts the
quickstart's step. `--page` writes the tables into docs/scale.md; without `--cpu` its real step stays there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.plan_cases import CASES, Case, Model
from benchmarks.plan_cpu import Quickstart, quickstart_check
from sfd_scale.planning.efficiency import Efficiency, Quantity
from sfd_scale.planning.footprint import Footprint, Precision, trace
from sfd_scale.planning.step_time import Step, StepTime, forward_seconds, step_time
from sfd_scale.planning.work import Work, trace_work
from sfd_scale.runtime.batch_split import BatchSplit

REAL_STEP = "**A real step here.**"
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
START, END = "<!-- plan_check: start -->", "<!-- plan_check: end -->"
TARGET_MEDIAN, TARGET_WORST = 0.25, 0.50
_NONE = Quantity(0.0, "s", "given", "the published runs have their own data pipelines")
PUBLIC = replace(Efficiency(), draw=_NONE, read=_NONE)


@dataclass(frozen=True)
class Result:
    """predicted: units/s of one GPU, as `case.published`."""

    case: Case
    predicted: float
    time: StepTime

    @property
    def error(self) -> float:
        """Of the predicted throughput, relative to the published one."""
        return self.predicted / self.case.published - 1


@functools.cache
def counts(model: Model, precision: str, fused_attention: bool = True) -> tuple[Footprint, Work]:
    exact: Precision = "bf16" if precision == "bf16" else "fp32"
    work = trace_work(model.make, model.inputs, exact, fused_attention)
    return trace(model.make, None, exact), replace(work, precision=precision)


def predict(case: Case, efficiency: Efficiency = PUBLIC) -> Result:
    footprint, work = counts(case.model, case.precision, case.fused_attention)
    split = BatchSplit(case.micro_batch, case.accumulation, case.ranks)
    step = Step(footprint, work, case.engine, split, min(8, case.ranks), num_workers=8)
    found = step_time(step, case.hardware, efficiency)
    encoding = 0.0
    if case.encoder is not None:
        _, frozen = counts(case.encoder, "tf32")
        encoding = case.accumulation * forward_seconds(frozen, case.micro_batch, False, case.hardware, efficiency)
    samples = case.micro_batch * case.accumulation
    return Result(case, samples * case.model.per_sample / (found.total + encoding), found)


def fit(cases: Sequence[Case]) -> tuple[float, float, float]:
    """The best shares of the peak of newer GPUs and of the A100, and of the memory bandwidth, on a grid.

    Copies reach 80 to 90% of the bandwidth. So less than 60% for the average kernel is not taken.
    """

    def loss(shares: tuple[float, float, float]) -> float:
        newer, a100, memory = shares
        constants = replace(PUBLIC, memory=replace(PUBLIC.memory, value=memory))
        hardware = [replace(c.hardware, tensor_share=a100 if "A100" in c.gpu else newer) for c in cases]
        tried = [replace(case, hardware=gpu) for case, gpu in zip(cases, hardware, strict=True)]
        return sum(math.log1p(predict(case, constants).error) ** 2 for case in tried)

    newer, a100 = ([n / 20 for n in range(first, 18)] for first in (9, 13))
    return min(itertools.product(newer, a100, [n / 20 for n in range(12, 18)]), key=loss)


HEAD = ("model", "GPUs", "micro-batch × accumulation", "settings", "published", "predicted", "error", "bound by")


def row(result: Result) -> str:
    case = result.case
    settings = ["compiled" if case.engine.compile else "eager", case.engine.sharding]
    if case.engine.activation_checkpointing != "none":
        settings.append(f"checkpointing {case.engine.activation_checkpointing}")
    cells = [
        case.model.name, f"{case.ranks} × {case.gpu}", f"{case.micro_batch} × {case.accumulation}",
        ", ".join(settings), f"{case.published:,.0f} {case.model.unit}", f"{result.predicted:,.0f}",
        f"{result.error:+.0%}", result.time.bound,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table(results: Sequence[Result]) -> str:
    return "\n".join([f"| {' | '.join(HEAD)} |", f"|{'---|' * 4}{'---:|' * 3}---|", *map(row, results)])


def errors(results: Sequence[Result]) -> tuple[float, float]:
    """Median and worst of the absolute errors."""
    absolute = [abs(result.error) for result in results]
    return statistics.median(absolute), max(absolute)


def report(results: Sequence[Result]) -> str:
    """Both tables with their errors, the sources, and the notes."""
    parts = []
    for title, fits in (("Held out", False), ("The constants are fitted to these", True)):
        chosen = [result for result in results if result.case.fits == fits]
        median, worst = errors(chosen)
        parts += [f"**{title}.** Error: median {median:.0%}, worst {worst:.0%}.", table(chosen)]
    notes = dict.fromkeys(f"- {r.case.model.name}, {r.case.gpu}: {r.case.note}." for r in results if r.case.note)
    sources = dict.fromkeys(f"- {result.case.source}" for result in results)
    return "\n\n".join([*parts, "\n".join(["Notes:", "", *notes]), "\n".join(["Sources:", "", *sources])])


def cpu_report(found: Quickstart, machine: str) -> str:
    return (
        f"{REAL_STEP} A step of the quickstart's model (`quickstart/sfd`, ZeRO-1, bf16, micro-batch "
        f"{found.micro_batch}) took {1000 * found.measured:.0f} ms, predicted {1000 * found.predicted:.0f} ms: error "
        f"{found.error:+.0%}. The CPU's constants were fitted to {found.fitted} steps of other sizes. {machine}."
    )


def insert(page: str, text: str) -> str:
    """The page with a new text between its marks. A measured step stays, unless the text has another one."""
    start, end = page.index(START) + len(START), page.index(END)
    old = page[start:end]
    if REAL_STEP in old and REAL_STEP not in text:
        text = f"{text}\n\n{old[old.index(REAL_STEP) :].strip()}"
    return f"{page[:start]}\n{text}\n{page[end:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the shares of peak and bandwidth again")
    parser.add_argument("--cpu", action="store_true", help="time real steps on this CPU: about a minute")
    parser.add_argument("--page", action="store_true", help="write the tables into docs/scale.md")
    options = parser.parse_args()
    if options.fit:
        newer, a100, memory = fit([case for case in CASES if case.fits])
        print(f"best shares: matmuls {newer:.2f}, on A100 {a100:.2f}; memory {memory:.2f}")
    text = report([predict(case) for case in CASES])
    if options.cpu:
        found = harness.machine()
        name = f"{found['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        date = time.strftime("%Y-%m-%d", time.gmtime())
        text = f"{text}\n\n{cpu_report(quickstart_check(), f'{name}, {date}')}"
    print(text)
    if options.page:
        PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
