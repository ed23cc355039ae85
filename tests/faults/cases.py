"""The faults. Each case makes its fault, starts the same command again, and says what was lost."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from sfd_scale.checkpoint import Checkpoint
from tests.faults.jobs import Forked, Job, Result, send
from tests.faults.network import cable
from tests.faults.work import EVERY, STEPS, Encoding, Generation, Training, Work, before_renames, command
from tests.helpers import small_run

LAST_SIGN = ("at its last heartbeat", "its last answer was")  # of a silent rank, of a silent store

# ------------------------------------------------------------------------------------------------- kills


def kill(work: Work, draw: random.Random, victim: str) -> Result:
    """SIGKILL of a rank, of all ranks, or of the launcher, at a random moment; then the same command."""
    out = work.fresh("killed")
    job = work.start(out)
    moment = time.monotonic() + draw.uniform(0.1, 1.0) * work.seconds
    while time.monotonic() < moment and job.running():
        time.sleep(0.002)
    ranks = job.ranks()
    if not job.running() or not ranks:
        job.wait()
        work.seconds *= 0.8  # over before the moment came: nothing was killed, and the next moment is drawn sooner
        return Result(0, 0)
    if victim == "launcher":
        send(job.launcher, signal.SIGKILL)  # type: ignore[attr-defined]
        left = psutil.wait_procs(ranks, timeout=90)[1]
        problem = f"{len(left)} ranks went on without their launcher" if left else None
        job.kill_all()
    else:
        for process in ranks if victim == "all" else [draw.choice(ranks)]:
            send(process, signal.SIGKILL)
        problem = None
    job.wait()
    before = work.intact(out) if isinstance(work, Training) else []
    problem = problem or work.finished(out)
    return Result.of(problem or _forgotten(work, before))


def kill_before_rename(work: Work, draw: random.Random) -> Result:
    """SIGKILL of a rank, or of all, between the write of a file and its rename: at a drawn one of all renames."""
    out, marker, counter = work.fresh("killed"), work.place / "paused", work.place / "counter"
    number = draw.randint(1, work.renames)
    for file in (marker, counter):
        file.unlink(missing_ok=True)

    def hook(rank: int) -> None:
        def pause(at: int) -> None:
            if at == number:
                marker.write_text(str(rank))
                time.sleep(600)

        before_renames(counter, pause)

    job = work.start(out, hook=hook)
    while job.running() and not (marker.exists() and marker.read_text()):
        time.sleep(0.002)
    if not marker.exists():
        return Result(0, 0)  # fewer renames than in the undisturbed command
    ranks = job.ranks()
    for process in ranks if draw.random() < 0.5 else [ranks[int(marker.read_text())]]:
        send(process, signal.SIGKILL)
    job.wait()
    before = work.intact(out) if isinstance(work, Training) else []
    return Result.of(work.finished(out) or _forgotten(work, before))


def _forgotten(work: Work, before: list[Checkpoint]) -> str | None:
    """Whether the next start did not go on from the newest checkpoint."""
    if before and f"resumed from {before[-1].path}" not in work.log.read_text().replace("\n", ""):
        return f"{before[-1].path.name} was committed and not resumed from"
    return None


# ----------------------------------------------------------------------------------------------- signals


def _until(job: Job, out: Path, step: int) -> None:
    """Wait until a step is logged."""
    metrics = out / "metrics.jsonl"
    while job.running() and (not metrics.exists() or metrics.read_bytes().count(b"\n") < step):
        time.sleep(0.005)


def terminated(work: Training, draw: random.Random) -> Result:
    """SIGTERM to one rank: all save the same step and leave with 75, on which launchers start again."""
    out = work.fresh("terminated")
    job = work.start(out)
    _until(job, out, draw.randint(2, 6))
    send(draw.choice(job.ranks()), signal.SIGTERM)
    code, saved = job.wait(), [checkpoint.step for checkpoint in work.intact(out)]
    logged = len(small_run.lines(out / "metrics.jsonl"))
    problem = None if code == 75 and logged in saved else f"ended with {code}, {logged} steps, saved {saved}"
    return Result.of(problem or work.finished(out))


def stopped(work: Training, draw: random.Random) -> Result:
    """SIGSTOP of one rank: the others give up after the timeout and name it."""
    out = work.fresh("stopped")
    job = work.start(out, overrides=["train.timeout_s=10"])
    _until(job, out, 4)
    number = draw.randrange(2)
    victim = job.ranks()[number]
    send(victim, signal.SIGSTOP)
    deadline = time.monotonic() + 180
    while job.running() and len(job.ranks()) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    late = "the others waited on" if len(job.ranks()) > 1 else None
    send(victim, signal.SIGKILL)
    job.wait()
    named = f"rank {number}" in job.output() and any(words in job.output() for words in LAST_SIGN)
    return Result.of(
        late, None if named else f"rank {number} was not named: {job.output()[-1500:]}", work.finished(out)
    )


def stopped_worker(work: Training, draw: random.Random, request: bool) -> Result:
    """SIGSTOP of the dataloader's worker of one rank. A stop request ends the wait, although the other rank is in the
    middle of the step; without one the rank gives up after the timeout and says why."""
    out = work.fresh("stalled")
    job = work.start(out, overrides=["data.num_workers=1", f"train.timeout_s={120 if request else 15}"])
    _until(job, out, EVERY + 2)
    (worker,) = draw.choice(job.ranks()).children()
    send(worker, signal.SIGSTOP)
    if request:
        time.sleep(1)
        for rank in job.ranks():
            send(rank, signal.SIGTERM)
    code, before = job.wait(150), work.intact(out)
    said = "a stop was requested in the wait for data" if request else "1 worker processes give none"
    told = said in job.output().replace("\n", " ") and (code == 75) == request and code
    problem = None if told else f"ended with {code} and said {job.output()[-1500:]}"
    return Result.of(problem, work.finished(out), _forgotten(work, before))


# --------------------------------------------------------------------------------------------- full disk


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A file system of so many bytes at `path`; needs root."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def full_disk(work: Work, draw: random.Random, size: str) -> Result:
    """The disk fills up on the way: the error says so, what was committed stays, and more space lets it go on."""
    out = work.fresh("full")
    with small_disk(out, size):
        code = work.start(out).wait()
        said = "No space left" in work.log.read_text() or "disk is full" in work.log.read_text()
        said = said or "free" in work.log.read_text()  # the check of free space before the first step
        problem = None if code and said else f"ended with {code} and said {work.log.read_text()[-1500:]}"
        before = work.intact(out) if isinstance(work, Training) else []
        subprocess.run(["mount", "-o", "remount,size=200m", str(out)], check=True)
        problem = problem or work.finished(out)
        problem = problem or _forgotten(work, before)
    return Result.of(problem)


# ----------------------------------------------------------------------------------- damaged checkpoints


def damaged(work: Training, draw: random.Random, harm: str) -> Result:
    """The newest checkpoint is damaged between two starts: it is named, skipped and kept; the one before is used."""
    out = work.fresh("damaged")
    job = work.start(out)
    _until(job, out, 3 * EVERY + 1)
    job.kill_all()
    job.wait()
    found = work.intact(out)
    if len(found) < 2:
        return Result(0, 0)
    file = draw.choice([path for path in sorted(found[-1].path.iterdir()) if path.name != "COMMIT"])
    data = bytearray(file.read_bytes())
    if harm == "truncated":
        file.write_bytes(data[: draw.randrange(len(data))])
    elif harm == "flipped":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
    else:
        file.unlink()
    problem = work.finished(out)
    log = work.log.read_text().replace("\n", "")
    if f"{found[-1].path.name} is damaged and skipped" not in log or file.name not in log:
        problem = problem or f"{file.name} of {found[-1].path.name} was {harm}, and the log does not name it"
    if f"resumed from {found[-2].path}" not in log:
        problem = problem or f"did not resume from {found[-2].path.name}"
    kept = [p for p in out.glob("checkpoints/*") if p.name.startswith(found[-1].path.name)]
    return Result.of(problem, None if kept else f"{found[-1].path.name} was deleted")


def other_world_size(work: Training, draw: random.Random) -> Result:
    """Two ranks save, one goes on: the same losses up to the order of sums."""
    out = work.fresh("shrunk")
    job = work.start(out)
    _until(job, out, EVERY + 2)
    job.kill_all()
    job.wait()
    code = work.start(out, ranks=1).wait()
    ours, expected = (small_run.lines(f / "metrics.jsonl") for f in (out, work.reference))
    worst = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, expected, strict=True))
    return Result.of(None if code == 0 and worst < 1e-4 else f"ended with {code}, losses differ by {worst:.2g}")


def other_recipe(work: Training, draw: random.Random) -> Result:
    """Another recipe in the same folder is refused with the key that differs, and changes nothing there."""
    out = work.fresh("foreign")
    problem = work.finished(out)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.suffix != ".txt"}
    code = work.start(out, overrides=["optimizer.lr=0.5"]).wait()
    said = "optimizer.lr: 0.5, in the checkpoint 0.01" in work.log.read_text().replace("\n", "")
    changed = [path.name for path, data in before.items() if path.name != "lock" and path.read_bytes() != data]
    return Result.of(problem, None if code == 2 and said else f"ended with {code}", ", ".join(changed) or None)


# -------------------------------------------------------------------------------------- shards, neighbours


def bad_shard(work: Training, draw: random.Random, harm: str) -> Result:
    """A shard goes, or is cut, while the run reads it: the run ends and names the file; put back, it goes on. One that
    is open already may go: the run ends as if nothing had been."""
    out, data, spare = work.fresh(f"shard-{harm}"), work.place / "data", work.place / "spare"
    shutil.copytree(data, spare, dirs_exist_ok=True)
    file = draw.choice(sorted(data.glob("*.mds")))
    job = work.start(out)
    _until(job, out, 2)
    if harm == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:50])
    code = job.wait()
    named = file.name in job.output()
    again = work.start(out).wait()  # before it is mended: said at the start
    shutil.copy2(spare / file.name, file)
    unharmed = harm == "removed" and code == 0 and work.difference(out) is None
    told = unharmed or (code and again and named)
    problem = None if told else f"ended with {code}, then {again}; named the file: {named}"
    return Result.of(problem or work.finished(out))


def two_runs(work: Training, draw: random.Random) -> Result:
    """A second start in the folder of a run that is alive is refused, and the first does not notice."""
    out = work.fresh("twice")
    first = work.start(out)
    _until(first, out, 2)
    log, work.log = work.log, work.place / "second.log"
    second = work.start(out)
    code, text = second.wait(), second.output()
    work.log = log
    refused = code == 2 and "is in use by process" in text
    return Result.of(
        None if refused else f"the second start ended with {code}: {text[-800:]}",
        f"the first ended: {first.output()[-800:]}" if first.wait() else work.difference(out),
    )


def network_cut(work: Training, draw: random.Random, seconds: float | None, *overrides: str) -> Result:
    """Each rank on a host of its own. The cable is cut: for seconds, and the run goes on; for good, and both ranks give
    up after the timeout and say so, and the next start goes on."""
    out = work.fresh("cut")
    timeout = f"train.timeout_s={60 if seconds else 6}"
    inner = command("train", str(work.recipe), "--run", str(out), timeout, *overrides)
    with cable() as link:

        def on_its_host() -> None:
            link.enter()
            inner()

        job = Forked(on_its_host, work.log, environment=link.environment)
        _until(job, out, 3)
        link.cut()
        if seconds:
            time.sleep(seconds)
            link.mend()
        code = job.wait()
    text = job.output()
    if seconds:
        return Result.of(f"ended with {code}: {text[-1500:]}" if code else work.difference(out))
    said = "waits in" in text and any(words in text for words in (*LAST_SIGN, "the store of the process group is gone"))
    problem = None if code and said else f"ended with {code} and said {text[-1500:]}"
    return Result.of(problem, work.finished(out))


def clock_set_back(work: Training, draw: random.Random) -> Result:
    """The clock that Python reads jumps back by a day in every rank, in the middle of the run."""
    out = work.fresh("clock")
    inner = command("train", str(work.recipe), "--run", str(out))

    def shifted() -> None:
        real, begun = time.time, time.monotonic()
        jump = begun + 0.4 * work.seconds
        time.time = lambda: real() - (86_400 if time.monotonic() > jump else 0)  # type: ignore[assignment]
        inner()

    code = Forked(shifted, work.log).wait()
    return Result.of(f"ended with {code}: {work.log.read_text()[-800:]}" if code else work.difference(out))


def wandb_unreachable(work: Training, draw: random.Random) -> Result:
    """W&B is asked for online, and no server answers: the run goes on, and says so."""
    out = work.fresh("wandb")
    key = "0123456789abcdef" * 2 + "01234567"
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": key, "WANDB_INIT_TIMEOUT": "5"}
    code = work.start(out, overrides=["wandb.mode=online"], environment=environment).wait(400)
    leaked = [path.name for path in out.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    text = work.log.read_text()
    return Result.of(
        f"ended with {code}: {text[-1500:]}" if code else work.difference(out),
        None if "W&B" in text else "nothing was said about it", f"the key is in {leaked}" if leaked else None,
        "the key is in the log" if key in text else None,
    )  # fmt: skip


def reader_beside_saves(work: Training, draw: random.Random) -> Result:
    """What `eval watch` does, over and over while checkpoints are saved and pruned: a checkpoint that it sees is whole,
    or gone altogether by the time it is read."""
    from sfd_scale.runs import RunFolder

    out, reads = work.fresh("watched"), 0
    job = work.start(out, overrides=["checkpoint.every=1", "checkpoint.keep_last=1"])
    while job.running():
        for checkpoint in RunFolder(out).checkpoints:
            try:
                weights = checkpoint.weights()
            except (ValueError, OSError) as error:
                if checkpoint.is_whole:
                    job.kill_all()
                    return Result.of(f"{checkpoint.path.name} is there and cannot be read: {error}")
                continue
            reads += all(bool(tensor.isfinite().all()) for tensor in weights.values())
    left = sorted(path.name for path in (out / "checkpoints").iterdir())
    tidy = None if left == [f"step-{STEPS:08d}"] else f"left: {left}"
    return Result.of(
        f"ended with {job.end()}" if job.end() else work.difference(out), tidy, None if reads else "no read"
    )


def two_readers(work: Encoding, draw: random.Random) -> Result:
    """Two processes read all of a remote through one cache that is too small for it, and a third is killed at it."""
    from sfd_scale.data.shards import check_data, open_shards

    cache, remote = work.fresh("cache"), work.reference
    limit = int(4.5 * max(file.stat().st_size for file in remote.glob("*.mds")))

    def read(seed: int) -> None:
        rows = open_shards(cache, remote=str(remote), cache_limit=str(limit))
        order = random.Random(seed).sample(range(rows.num_samples), rows.num_samples)
        if [rows[index]["id"] for index in order] != order:
            raise ValueError("wrong rows")

    jobs = [Forked(lambda seed=seed: read(seed), work.log, ranks=1) for seed in draw.sample(range(1000), 3)]  # type: ignore[misc]
    while not list(cache.glob("*.mds")) and jobs[2].running():
        time.sleep(0.001)
    jobs[2].kill_all()
    jobs[2].wait()
    codes = [job.wait() for job in jobs[:2]]
    size = sum(file.stat().st_size for file in cache.glob("*.mds"))
    return Result.of(
        f"readers ended with {codes}: {work.log.read_text()[-800:]}" if any(codes) else None,
        f"the cache holds {size} bytes of {limit}" if size > limit else None,
        *(line for line in check_data(cache) if "missing" not in line),
    )


# ------------------------------------------------------------------------------------------------ the list

Case = Callable[[random.Random], Result]


def cases(place: Path) -> tuple[list[Work], dict[str, Case]]:
    """The forked commands, and every single fault by name."""
    train, encode, generation = Training(place), Encoding(place), Generation(place)
    singles: dict[str, Case] = {
        "SIGTERM to a rank": lambda draw: terminated(train, draw),
        "SIGSTOP of a rank": lambda draw: stopped(train, draw),
        "worker stopped, SIGTERM": lambda draw: stopped_worker(train, draw, request=True),
        "worker stopped": lambda draw: stopped_worker(train, draw, request=False),
        "disk full, train": lambda draw: full_disk(train, draw, "700k"),
        "disk full, encode": lambda draw: full_disk(encode, draw, "300k"),
        "disk full, generate": lambda draw: full_disk(generation, draw, "60k"),
        **{f"checkpoint {harm}": _damaged(train, harm) for harm in ("truncated", "flipped", "deleted")},
        "fewer ranks than saved": lambda draw: other_world_size(train, draw),
        "another recipe": lambda draw: other_recipe(train, draw),
        "shard removed": lambda draw: bad_shard(train, draw, "removed"),
        "shard cut": lambda draw: bad_shard(train, draw, "cut"),
        "two runs, one folder": lambda draw: two_runs(train, draw),
        "two readers, one cache": lambda draw: two_readers(encode, draw),
        "a reader beside saves": lambda draw: reader_beside_saves(train, draw),
        "network cut for seconds": lambda draw: network_cut(train, draw, 3.0),
        "network cut for good": lambda draw: network_cut(train, draw, None),
        "network cut beside saves": lambda draw: network_cut(train, draw, None, "checkpoint.every=1"),
        "clock set back": lambda draw: clock_set_back(train, draw),
        "W&B unreachable": lambda draw: wandb_unreachable(train, draw),
    }
    return [train, encode, generation], singles


def _damaged(train: Training, harm: str) -> Case:
    return lambda draw: damaged(train, draw, harm)
