"""Which environment variables reach the ranks of other hosts.

DeepSpeed's pdsh runner exports PYTHON*, MLFLOW*, UCX*, MV2* and NCCL* only, and reads more from a file of its own that
must hold neither comments nor blank lines. That file is written here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

# Documented in docs/multinode.md.
PREFIXES = (
    "NCCL_", "GLOO_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "CUDA_", "DS_", "DEEPSPEED_", "OMP_", "MKL_",
    "WANDB_", "HF_", "UCX_", "FI_", "SFD_",
)  # fmt: skip
NAMES = ("LD_LIBRARY_PATH", "MAX_JOBS", "MASTER_ADDR", "MASTER_PORT", "NO_COLOR", "S3_ENDPOINT_URL", "TMPDIR")
# A host has its own.
_NEVER = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)


def exported(environment: Mapping[str, str], wanted: Sequence[str] = ()) -> dict[str, str]:
    """The variables to export: those of `PREFIXES` and `NAMES`, and those `wanted` by name.

    What looks like a secret goes only by name: it would stand in command lines that any user of the hosts can read.

    Raises:
        ValueError: for a wanted name that is not set, or a value of more than one line.
    """
    for name in wanted:
        if name not in environment:
            raise ValueError(f"EXPORT: {name} is not set; set it, or leave it out")
    names = [n for n in environment if n.startswith(PREFIXES) or n in NAMES]
    names = [n for n in names if n not in _NEVER and not _SECRET.search(n)]
    out = {name: environment[name] for name in sorted({*names, *wanted})}
    for name, value in out.items():
        if "\n" in value:
            raise ValueError(f"{name}: a value of several lines, which no launcher passes on; unset it")
    return out


def read_env_file(path: Path) -> dict[str, str]:
    """A user's own `.deepspeed_env`, with the comments and blank lines that DeepSpeed stumbles over.

    Raises:
        ValueError: for a line that is not NAME=VALUE.
    """
    out = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, sign, value = line.strip().removeprefix("export ").partition("=")
        if not sign or not name.strip().isidentifier():
            raise ValueError(f"{path}, line {number}: {line!r}; allowed: NAME=VALUE")
        out[name.strip()] = value.strip().strip("'\"")
    return out


def write_env_file(path: Path, variables: Mapping[str, str]) -> None:
    """The file that DeepSpeed reads (DS_ENV_FILE); it puts quotes around values with blanks by itself."""
    path.touch(mode=0o600)
    path.write_text("".join(f"{name}={_escaped(value)}\n" for name, value in variables.items()), encoding="utf-8")


def _escaped(value: str) -> str:
    """What a shell would still read between double quotes."""
    return re.sub(r'([\\"$`])', r"\\\1", value)


def quoted_for_pdsh(argument: str) -> str:
    """An argument that arrives as it is: pdsh joins them for a shell, and DeepSpeed quotes only those with a blank."""
    if " " in argument:
        return re.sub(r"([\\$`])", r"\\\1", argument)  # DeepSpeed adds double quotes, and escapes those inside
    return shlex.quote(argument)
