"""Output never fails: not for its encoding, not for a reader that is gone, not if it is closed."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfd_scale.runtime import errors, files

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict", "PYTHONUNBUFFERED": "1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_ascii_output_is_written_with_words_that_ascii_has(variables: dict[str, str]) -> None:
    words = ["sfd_scale", "plan", "train/sfd_xl", "--gpus", "8"]  # its table has lines and a ×
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, timeout=120, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr
    assert b" x " in done.stdout and done.stdout.isascii() and done.stderr.isascii()


EXPECTED = {
    "latin-1": "1 - 2 -> ü \\u6f22 \\udcff\n",
    "cp1252": "1 – 2 -> ü \\u6f22 \\udcff\n",
    "koi8-r": "1 - 2 -> \\xfc \\u6f22 \\udcff\n",
}


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "koi8-r"])
def test_any_encoding_of_the_output_is_kept(encoding: str) -> None:
    program = "from sfd_scale.runtime import output; output.make_safe(); print('1 – 2 → ü 漢 \\udcff')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}
    )
    expected = "1 – 2 → ü 漢 \\udcff\n" if encoding == "utf-16" else EXPECTED[encoding]
    assert (done.returncode, done.stdout.decode(encoding)) == (0, expected)


def test_a_reader_that_is_gone_ends_nothing() -> None:
    for command in ("recipes", "show quickstart/sfd"):
        words = f"set -o pipefail; {sys.executable} -m sfd_scale {command} | head -1 | cat; echo ${{PIPESTATUS[@]}}"
        done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.stdout.splitlines()[-1].split() == ["0", "0", "0"] and done.stderr == ""


def test_the_work_after_a_closed_pipe_is_done() -> None:
    program = (
        "import os, sys\n"
        "from sfd_scale.runtime import output\n"
        "output.make_safe()\n"
        "for i in range(3): print('x' * 100_000)\n"
        "os.write(1, b'native')\n"
        "sys.stderr.write('done')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == (b"done", 0)


def test_closed_output_is_no_error_and_no_file_gets_it(tmp_path: Path) -> None:
    program = (
        "from sfd_scale.runtime import output\n"
        "output.make_safe()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "print('lost'); import os; os.write(1, b'lost too')\n"
        "file.write('kept')\n"
    )
    done = subprocess.run(["bash", "-c", '"$0" -c "$1" >&- 2>&-', sys.executable, program], cwd=ROOT, timeout=60)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "kept"


def test_a_full_device_is_one_sentence() -> None:
    words = f"{sys.executable} -m sfd_scale show quickstart/sfd > /dev/full"
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "the disk is full" in done.stderr


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(2, "No such file or directory", "a b"), "a b: no such file or folder"),
        (IsADirectoryError(21, "Is a directory", "runs"), "runs: a folder; allowed: a file"),
        (PermissionError(13, "Permission denied", b"x\xff"), "x\udcff: no permission; allowed: a path"),
        (OSError(30, "Read-only file system", "/opt/x"), "/opt/x: the file system is read-only; give a folder"),
        (OSError(99, "Cannot assign requested address"), "Cannot assign requested address"),
        (OSError("our own sentence"), "our own sentence"),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
            "not utf-8 text: invalid start byte at byte 0",
        ),
        (ValueError("key: value; allowed: another"), "key: value; allowed: another"),
    ],
)
def test_errors_of_the_system_are_sentences(error: Exception, text: str) -> None:
    assert errors.error_text(error).startswith(text) and "Errno" not in errors.error_text(error)


def _texts_without_encoding(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        module = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) in (
            "os",
            "Image",
            "tarfile",
            "archive",
            "shard",
        )
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        text_mode = name == "open" and not module and all("b" not in mode for mode in modes[-1:])
        decoded = any(keyword.arg in ("text", "universal_newlines") for keyword in node.keywords)
        method = name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)
        if method or text_mode or (name in ("run", "Popen", "check_output") and decoded):
            yield f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:80]}"


def test_the_encoding_of_every_text_file_and_pipe_is_said() -> None:
    """Otherwise it is that of the locale, and a file that one machine writes is not read by another."""
    sources = [f for folder in ("sfd_scale", "eval", "benchmarks") for f in ROOT.glob(f"{folder}/**/*.py")]
    found = [line for file in sources for line in _texts_without_encoding(file)]
    assert len(sources) > 150 and found == []


def test_files_hold_paths_that_are_no_text(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "file", "runs/\udcff – ü\n")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "runs/\\udcff – ü\n"
