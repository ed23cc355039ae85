"""Which environment variables are exported to the ranks of other hosts.

DeepSpeed's pdsh runner exports only PYTHON*, MLFLOW*, UCX*, MV2* and NCCL*. It reads further variables from a file
(DS_ENV_FILE), without comments or blank lines. This module writes that file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from sfd_scale.runtime.files import read_text

# Documented in docs/multinode.md.
PREFIXES = (
    "NCCL_", "GLOO_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "CUDA_", "DS_", "DEEPSPEED_", "OMP_", "MKL_",
    "WANDB_", "HF_", "UCX_", "FI_", "SFD_",
)  # fmt: skip
NAMES = ("LD_LIBRARY_PATH", "MAX_JOBS", "MASTER_ADDR", "MASTER_PORT", "NO_COLOR", "S3_ENDPOINT_URL", "TMPDIR")
# These differ from host to host.
_NEVER = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)


def exported(environment: Mapping[str, str], wanted: Sequence[str] = ()) -> dict[str, str]:
    """The variables to export: those that match `PREFIXES` or `NAMES`, and those in `wanted`.

    A variable that looks like a secret is exported only if `wanted` names it: exported values are part of command
    lines, which every user of a host can read.

    Raises:
        ValueError: if a wanted variable is not set, or a value has several lines.
    """
    for name in wanted:
        if name not in environment:
            raise ValueError(f"EXPORT: {name} is not set; set it, or leave it out")
    names = [n for n in environment if n.startswith(PREFIXES) or n in NAMES]
    names = [n for n in names if n not in _NEVER and not _SECRET.search(n)]
    out = {name: environment[name] for name in sorted({*names, *wanted})}
    for name, value in out.items():
        if "\n" in value:
            raise ValueError(f"{name}: its value has several lines, which launchers cannot export; unset it")
    return out


def read_env_file(path: Path) -> dict[str, str]:
    """Read a user's `.deepspeed_env`; unlike DeepSpeed, allow comments and blank lines.

    Raises:
        ValueError: if a line is not NAME=VALUE.
    """
    out = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, sign, value = line.strip().removeprefix("export ").partition("=")
        if not sign or not name.strip().isidentifier():
            raise ValueError(f"{path}, line {number}: {line!r}; allowed: NAME=VALUE")
        out[name.strip()] = value.strip().strip("'\"")
    return out


def write_env_file(path: Path, variables: Mapping[str, str]) -> None:
    """Write the file that DeepSpeed reads (DS_ENV_FILE). DeepSpeed quotes values that contain blanks."""
    path.touch(mode=0o600)
    path.write_text("".join(f"{name}={_escaped(value)}\n" for name, value in variables.items()), encoding="utf-8")


def _escaped(value: str) -> str:
    """Escape the characters that a shell interprets between double quotes."""
    return re.sub(r'([\\"$`])', r"\\\1", value)


def quoted_for_pdsh(argument: str) -> str:
    """Quote an argument for pdsh, which runs a shell. DeepSpeed's runner quotes only arguments with a blank."""
    if " " in argument:
        return re.sub(r"([\\$`])", r"\\\1", argument)  # DeepSpeed adds double quotes and escapes inner ones
    return shlex.quote(argument)
