"""`sfd doctor`: its findings on this machine, and its advice for what is missing."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from sfd_scale import doctor

GIB = 2**30


def levels(found: list[doctor.Finding]) -> dict[str, str]:
    return {finding.subject: finding.level for finding in found}


def test_doctor_finds_no_error_on_the_machine_of_the_tests() -> None:
    done = subprocess.run([sys.executable, "-m", "sfd_scale", "doctor"], capture_output=True, text=True, timeout=300)
    # DeepSpeed announces its choice of accelerator on the same stream, in brackets.
    lines = [line.strip() for line in done.stdout.splitlines() if line and not line.startswith("[")]
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok  gloo: two processes of this host reach each other" in lines
    assert any(line.startswith("ok  packages: torch ") for line in lines)
    assert any(line.startswith("ok  attention: auto uses ") for line in lines)
    assert all(line.split()[0] in ("ok", "warning") for line in lines)


def test_a_missing_or_old_package_comes_with_the_command_that_installs_it() -> None:
    missing = doctor.check_package(Requirement("no-such-package>=2"))
    assert (missing.level, missing.text) == ("error", "not installed; run `pip install 'no-such-package>=2'`")
    old = doctor.check_package(Requirement("numpy>=999"))
    assert old.level == "error"
    assert old.text.endswith("but >=999 is needed; run `pip install 'numpy>=999'`")
    assert doctor.check_package(Requirement("numpy>=1")).level == "ok"


def test_the_least_versions_are_those_of_pyproject_whatever_was_installed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert doctor.declared_requirements() == project["dependencies"]
    (torch,) = [r for r in map(Requirement, project["dependencies"]) if r.name == "torch"]
    # Checkpoints of several ranks need torch.distributed.checkpoint.CheckpointableTensor, which came with 2.14.
    assert not torch.specifier.contains("2.13.1") and not torch.specifier.contains("2.14.0")
    assert torch.specifier.contains("2.15.0")
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=99"]\n')
    monkeypatch.setattr(doctor.config, "CHECKOUT", tmp_path)
    finding = next(found for found in doctor.versions() if found.subject == "torch")
    assert finding.level == "error" and "but >=99 is needed; run `pip install 'torch>=99'`" in finding.text
    monkeypatch.setattr(doctor.config, "CHECKOUT", None)  # a wheel
    assert any(text.startswith("torch") for text in doctor.declared_requirements())


@pytest.mark.parametrize(("size", "level"), [(64 * 2**20, "error"), (GIB // 2, "warning"), (2 * GIB, "ok")])
def test_small_shared_memory_is_reported(size: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    finding = next(iter(doctor.limits()))
    assert (finding.subject, finding.level) == ("shared memory", level)
    assert ("--shm-size" in finding.text) == (level != "ok")


def test_a_driver_that_is_too_old_for_the_locked_torch_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.133.20  Sun Mar 23 2025\nGCC version: 13\n")
    assert doctor.driver_release(version) == 570 and doctor.driver_release(tmp_path / "none") is None
    monkeypatch.setattr(doctor, "gpu_count", lambda: 8)
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "driver_release", lambda: 570)
    (finding,) = doctor.accelerator()
    assert finding.level == "error" and finding.text.endswith("its driver is r570, and CUDA 13 needs r580 or newer")


def test_a_tmpdir_without_room_for_sockets_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ("x" * 90)).mkdir()
    for folder, level in ((Path("/tmp"), "ok"), (tmp_path / ("x" * 90), "error"), (tmp_path / "none", "error")):
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        monkeypatch.setattr("multiprocessing.util.get_temp_dir", lambda folder=folder: str(folder))
        assert levels(list(doctor.limits()))["TMPDIR"] == level


def test_few_open_files_and_a_full_disk_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (1024, 4096))
    assert levels(list(doctor.limits()))["open files"] == "warning"
    monkeypatch.chdir(tmp_path)
    for free, level in ((GIB // 2, "error"), (10 * GIB, "warning"), (100 * GIB, "ok")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert levels(list(doctor.disk()))["disk"] == level


def test_ops_that_are_not_compiled_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.build_ops, "missing", lambda: ["cpu_adam"])
    (finding,) = doctor.extensions()
    assert "python -m sfd_scale.engines.build_ops" in finding.text
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (finding,) = doctor.extensions()
    assert (finding.level, finding.text) == ("error", "cpu_adam not compiled, and c++, ninja missing; install them")
    (finding,) = doctor.tools()
    assert finding.text.startswith("no ssh, pdsh; needed for HOSTFILE launches")


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[doctor.Finding]:
        raise RuntimeError("driver gone")

    monkeypatch.setattr(doctor, "CHECKS", (broken, lambda: [doctor.Finding("ok", "next", "")]))
    assert doctor.examine() == [
        doctor.Finding("error", "broken", "RuntimeError: driver gone"),
        doctor.Finding("ok", "next", ""),
    ]
