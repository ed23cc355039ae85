"""Environment variables: no other module reads or sets them.

Launchers, schedulers and users set them, so their values are not ours to trust. A variable whose value is empty or
blank counts as not set. A value that cannot be used is a ValueError of one sentence: the variable, its value, what is
allowed.

This module needs the standard library alone: `import sfd_scale` calls `prepare` before any library reads a variable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping, Sequence

# An empty value of these is removed for libraries too: torch, DeepSpeed and streaming call int() on them.
_RANK_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "CROSS_RANK", "CROSS_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_OTHERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MAX_JOBS", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "TMPDIR", "HOME")
_PREFIXES = ("SLURM_", "OMPI_", "PMI_", "PET_", "TORCHELASTIC_", "WANDB_", "SFD_", "HF_", "XDG_", "TRITON_")
# A launcher sets these for its own ranks. What an outer launcher left would win over that, and all ranks would have one
# number (RANK), or wait for a store that nobody serves (TORCHELASTIC_USE_AGENT_STORE).
_OF_ONE_RANK = tuple(n for n in _RANK_VARIABLES if n not in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"))

ACCELERATORS = ("cpu", "cuda")
_DEVICE = re.compile(r"\d+|(?:GPU|MIG)-[\w./-]+", re.IGNORECASE)
_NO_DEVICE = ("-1", "NoDevFiles")  # of CUDA, and of schedulers for a job without a GPU
_OLD_WANDB_MODES = {"dryrun": "offline", "run": "online"}  # W&B still reads these names
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


# ------------------------------------------------------------------------------------------------- reading


def text(name: str, environment: Mapping[str, str] | None = None) -> str | None:
    """The value of a variable, without blanks around it; None if it is not set or empty.

    Args:
        environment: of this process by default.
    """
    return (os.environ if environment is None else environment).get(name, "").strip() or None


def whole_number(
    name: str, environment: Mapping[str, str] | None = None, *, least: int = 0, most: int | None = None
) -> int | None:
    """The value of a variable as a number; None if it is not set or empty.

    Raises:
        ValueError: if it is not a whole number from `least` to `most`.
    """
    value = text(name, environment)
    if value is None:
        return None
    # Not str.isdigit, which is true for digits that int() refuses, and not int(), which takes `1_0` and `+1`.
    if not re.fullmatch(r"[0-9]{1,18}", value) or int(value) < least or (most is not None and int(value) > most):
        allowed = f"a whole number, {least} and up" if most is None else f"a whole number from {least} to {most}"
        raise ValueError(f"{name}: {value!r}; allowed: {allowed}")
    return int(value)


def flag(name: str, environment: Mapping[str, str] | None = None) -> bool:
    """Whether a switch is on; off if it is not set.

    Raises:
        ValueError: if it is neither 1 nor 0, or a word for them.
    """
    value = text(name, environment)
    if value is not None and value.lower() not in (*_TRUE, *_FALSE):
        raise ValueError(f"{name}: {value!r}; allowed: 1 or 0")
    return value is not None and value.lower() in _TRUE


def choice(name: str, allowed: Sequence[str], environment: Mapping[str, str] | None = None) -> str | None:
    """The value of a variable that has few values; None if it is not set or empty.

    Raises:
        ValueError: for any other value.
    """
    value = text(name, environment)
    if value is not None and value not in allowed:
        raise ValueError(f"{name}: {value!r}; allowed: {', '.join(allowed)}")
    return value


def visible_devices(environment: Mapping[str, str] | None = None) -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names, by place: numbers, GPU-… or MIG-…; None if it is not set.

    An empty value hides all GPUs, as for CUDA itself; so do -1 and `NoDevFiles`.

    Raises:
        ValueError: for an entry of another kind, or one that occurs twice.
    """
    name = "CUDA_VISIBLE_DEVICES"
    given = (os.environ if environment is None else environment).get(name)
    if given is None:
        return None
    entries = [entry.strip() for entry in given.strip().removesuffix(",").split(",")]
    hidden = next((place for place, entry in enumerate(entries) if entry in _NO_DEVICE), len(entries))
    entries = entries[:hidden] if any(entries) else []
    for entry in entries:
        if not _DEVICE.fullmatch(entry) or entries.count(entry) > 1:
            raise ValueError(
                f"{name}: {given!r}; allowed: numbers of GPUs, or names such as GPU-8932f937 and MIG-8932f937, each "
                "once, with commas between them"
            )
    return entries


def is_mig(device: str) -> bool:
    """Whether an entry of CUDA_VISIBLE_DEVICES names a MIG instance."""
    return device.upper().startswith("MIG")


def on_cpu(environment: Mapping[str, str] | None = None) -> bool:
    """Whether DS_ACCELERATOR asks for the CPU."""
    return text("DS_ACCELERATOR", environment) == "cpu"


def wandb_mode(environment: Mapping[str, str] | None = None) -> str | None:
    """The mode that WANDB_DISABLED or WANDB_MODE asks for: online, offline or disabled; None if neither is set.

    Raises:
        ValueError: for a value that W&B does not have, or a mode for several writers of one run.
    """
    disabled = flag("WANDB_DISABLED", environment)
    mode = choice("WANDB_MODE", ("online", "offline", "disabled", *_OLD_WANDB_MODES), environment)
    return "disabled" if disabled else _OLD_WANDB_MODES.get(mode or "", mode)


def snapshot() -> dict[str, str]:
    """A copy of the variables of this process, for a child process."""
    return dict(os.environ)


# ------------------------------------------------------------------------------------------------- setting


def set_variables(values: Mapping[str, str]) -> None:
    """Set variables of this process, which its libraries and child processes read."""
    os.environ.update(values)


def set_default(name: str, value: str) -> str:
    """Set a variable of this process unless it has a value; returns its value."""
    if text(name) is None:
        os.environ[name] = value
    return os.environ[name]


def variables() -> MutableMapping[str, str]:
    """The variables of this process themselves: changes are seen by libraries and child processes."""
    return os.environ


def prepare() -> None:
    """Remove known variables that are empty, and hide all GPUs if DS_ACCELERATOR is cpu.

    The latter holds for every library, and has to come before one of them looks for a GPU.
    """
    for name in [n for n in os.environ if n in (*_RANK_VARIABLES, *_OTHERS) or n.startswith(_PREFIXES)]:
        if text(name) is None:
            del os.environ[name]
    if on_cpu():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def check(environment: Mapping[str, str] | None = None) -> None:
    """Check the variables that libraries read as numbers and words. Every command calls it first.

    Args:
        environment: of this process by default.

    Raises:
        ValueError: names the first one that cannot be used.
    """
    for name in ("RANK", "LOCAL_RANK"):
        whole_number(name, environment)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MAX_JOBS", "MKL_NUM_THREADS"):
        whole_number(name, environment, least=1)
    whole_number("MASTER_PORT", environment, most=65535)
    choice("DS_ACCELERATOR", ACCELERATORS, environment)
    visible_devices(environment)
    wandb_mode(environment)
    threads = text("OMP_NUM_THREADS", environment)  # OpenMP allows one number for each level of nested parallel regions
    if threads is not None and not re.fullmatch(r"\s*[1-9][0-9]{0,8}\s*(,\s*[1-9][0-9]{0,8}\s*)*", threads):
        raise ValueError(f"OMP_NUM_THREADS: {threads!r}; allowed: a whole number, 1 and up")


# --------------------------------------------------------------------------------------------------- ranks


def launched() -> bool:
    """Whether a launcher (torchrun, deepspeed, sfd launch) started this process as a rank."""
    return text("RANK") is not None and text("WORLD_SIZE") is not None


def rank() -> int:
    """The number of this rank; 0 without a launcher."""
    return (whole_number("RANK") or 0) if launched() else 0


def check_rank() -> None:
    """Check that the variables of a rank belong together. A process that joins a process group calls it first.

    Raises:
        ValueError: for a number that is not below its count, or a part of the variables alone.
    """
    advice = "start ranks with `sfd launch`, or unset it for a single process"
    number, count = whole_number("RANK"), whole_number("WORLD_SIZE", least=1)
    if number and count is None:
        raise ValueError(f"RANK: {number}, but WORLD_SIZE is not set; {advice}")
    if number is None and (count or 1) > 1:
        raise ValueError(f"WORLD_SIZE: {count}, but RANK is not set; {advice}")
    for name, of in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        number, count = whole_number(name), whole_number(of, least=1)
        if launched() and number is not None and count is not None and number >= count:
            raise ValueError(f"{name}: {number} with {of}={count}; allowed: 0 to {count - 1}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if launched() and text(name) is None:
            raise ValueError(f"{name}: not set, but RANK and WORLD_SIZE are; {advice.replace('it', 'these')}")


def check_alone() -> None:
    """Check that no other launcher started this process as one of several: each of them would train the run alone.

    Raises:
        ValueError: names the variable of srun or of MPI that counts them.
    """
    for count in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        tasks = whole_number(count)
        if not launched() and tasks is not None and tasks > 1:
            raise ValueError(
                f"{count}: {tasks}, but RANK is not set, so {tasks} processes would each train this run alone; start "
                "one command per node with launchers/torchrun.sh, or use launchers/slurm.sbatch"
            )


def without_rank(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables without those that a launcher set for one rank: of a process that is to start ranks of its own."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_ONE_RANK and not name.startswith("TORCHELASTIC_")
    }


def see_own_device() -> None:
    """Let a rank of several see its own MIG instance alone: CUDA shows a process only the first one of the list."""
    seen, place = visible_devices() or [], whole_number("LOCAL_RANK") or 0
    if place < len(seen) and len(seen) > 1 and is_mig(seen[place]):
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[place]
