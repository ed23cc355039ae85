"""What launchers/ has beside its commands: the files for Slurm and Kubernetes, and that all of it is bash."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sfd_scale import config
from sfd_scale.launch import status

ROOT = Path(__file__).resolve().parents[3]
CPU = {"DS_ACCELERATOR": "cpu", "PATH": os.environ["PATH"]}
TRAIN = ("train", "quickstart/vision")


def test_the_kubernetes_file_starts_one_torchrun_a_pod_with_as_many_nodes_everywhere() -> None:
    job = yaml.safe_load((ROOT / "launchers/kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert spec["parallelism"] == spec["completions"] == int(variables["NODES"] or 0)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["RANKS"] or 0)
    # The name that a JobSet gives its first pod: set, replicated job, its replica, index; then the subdomain.
    assert variables["MASTER_ADDR"] == f"{job['metadata']['name']}-{replicated['name']}-0-0.{job['metadata']['name']}"
    assert (ROOT / container["command"][0]).is_file()
    config.tree(container["args"][1])
    # What JobSet's webhook asks of the name of a rule.
    names = [rule["name"] for rule in job["spec"]["failurePolicy"]["rules"]]
    assert all(re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", name) for name in names)
    codes = [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes == [[status.REQUEUE_EXIT_CODE]]
    grace = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > int(variables["SHUTDOWN_TIMEOUT"] or 0)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost"}


@pytest.mark.parametrize(
    ("signum", "variables", "commands_given"),
    [
        (signal.SIGUSR1, {}, ["requeue 7"]),
        (signal.SIGTERM, {}, []),  # scancel: saved, and not started again
        (signal.SIGUSR1, {"CHAIN": "2"}, ["submit --dependency=afterany:7 --nodes 1"]),
        (signal.SIGUSR1, {"CHAIN": "2", "SLURM_RESTART_COUNT": "1"}, []),  # its chain is there already
    ],
)
def test_the_slurm_script_requeues_what_was_stopped_and_not_what_was_cancelled(
    tmp_path: Path, signum: signal.Signals, variables: dict[str, str], commands_given: list[str]
) -> None:
    """Slurm's commands are played here: what they were given is in `given`; srun ends with 75 when it is signalled."""
    played = {
        "scontrol": f'if [[ $1 == show ]]; then echo localhost; else echo "$*" >>{tmp_path}/given; fi',
        "sbatch": f'echo submit "${{@:1:3}}" >>{tmp_path}/given',
        "srun": f"trap 'exit 75' USR1; touch {tmp_path}/started; while :; do sleep 0.05; done",
    }
    for name, text in played.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = subprocess.Popen(
        ["bash", str(ROOT / "launchers/slurm.sbatch"), *TRAIN],
        cwd=ROOT,
        env={**CPU, **SLURM, **variables, "PATH": path},
    )
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    script.send_signal(signum)
    assert script.wait(timeout=30) == 75
    given = (tmp_path / "given").read_text().splitlines() if (tmp_path / "given").exists() else []
    assert given == commands_given


def test_the_scripts_are_bash() -> None:
    for name in ("deepspeed.sh", "torchrun.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", str(ROOT / "launchers" / name)], check=True)
        assert os.access(ROOT / "launchers" / name, os.X_OK) or name.endswith("sbatch")
