"""The notebook of the docs runs from its first cell to its last on a small export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.sfd_scale.test_hub import run as run  # a fixture: the run folder of a small diffusion model
from tests.sfd_scale.test_sample import folder as folder  # a fixture: its export

ROOT = Path(__file__).parents[1]


def test_the_notebook_draws_sweeps_and_plots(folder: Path, tmp_path: Path) -> None:
    notebook = json.loads((ROOT / "docs/notebook.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    (tmp_path / "notebook.py").write_text(code)
    environment = os.environ | {"SFD_MODEL": str(folder), "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "notebook"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "10 classes" in done.stdout and "4.0:" in done.stdout
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width == 600
