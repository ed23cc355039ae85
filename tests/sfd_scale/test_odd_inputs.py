"""Odd files in the place of what a command reads: one sentence about the file, never Python's own error."""

import os
import re
import sys
from pathlib import Path

import pytest

import eval.__main__
import sfd_scale.__main__
from sfd_scale.runtime import files

CONTENTS = {
    "missing": None,
    "empty": b"",
    "binary": bytes(range(256)),
    "latin-1": "name: café \xff\n".encode("latin-1"),
    "utf-16": "kind: train\n".encode("utf-16"),
    "cut JSON": b'{"a": 1, "b": [1, 2',
    "a list": b"[1, 2]\n",
    "a number": b"5\n",
    "another object": b'{"format": 1, "kind": "x"}\n',
    "a zip": b"PK\x03\x04" + bytes(40),
    "HTML": b"<!DOCTYPE html><html>not found</html>",
    "folder": None,
    "loop": None,
    "pipe": None,
}
COMMANDS = {
    "show": (sfd_scale.__main__, ["show", "{}.yaml"]),
    "diff": (sfd_scale.__main__, ["diff", "train/sfd_xl", "{}.yaml"]),
    "plan": (sfd_scale.__main__, ["plan", "{}.yaml", "--gpus", "8"]),
    "GPU": (sfd_scale.__main__, ["plan", "train/sfd_xl", "--gpus", "8", "--gpu-spec", "{}.yaml"]),
    "measured": (sfd_scale.__main__, ["plan", "train/sfd_xl", "--gpus", "8", "--measured", "{}.json"]),
    "metrics": (sfd_scale.__main__, ["plan", "train/sfd_xl", "--gpus", "8", "--measured", "{}.jsonl"]),
    "report": (sfd_scale.__main__, ["report", "{}"]),
    "compare": (eval.__main__, ["compare", "{}.json", "{}.json"]),
}
RAW = re.compile(r"Traceback|Errno|codec can't|invalid literal|KeyError|object has no|unhashable|must be str")


pytestmark = pytest.mark.usefixtures("keep_logging")


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", COMMANDS)
def test_an_odd_file_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    module, words = COMMANDS[name]
    words = [word.format(tmp_path / "a b") if "{}" in word else word for word in words]
    path = Path(next(word for word in words if word.startswith(str(tmp_path))))
    data = CONTENTS[content]
    if content == "folder":
        path.mkdir()
    elif content == "loop":
        path.symlink_to(path)
    elif content == "pipe":
        os.mkfifo(path)
    elif data is not None:
        path.write_bytes(data)
    monkeypatch.setattr(sys, "argv", ["sfd", *words])
    with pytest.raises(SystemExit) as end:
        module.main()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(said) == 1
    assert str(tmp_path) in said[0] and not RAW.search(said[0])


def test_lines_of_json_are_read_up_to_a_torn_last_one_and_another_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('\ufeff{"step": 1}\n\n{"step": 2}\n{"ste', encoding="utf-8")
    assert files.read_json_lines(file) == [{"step": 1}, {"step": 2}]
    for text, message in (('{"ste\n{"step": 2}\n', "line 1 is damaged"), ("[1]\n", r"line 1 holds '\[1\]'")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            files.read_json_lines(file)
