"""What several tests of the evaluation start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eval.images.sources import NpzSource


@pytest.fixture
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def reference(tmp_path: Path) -> NpzSource:
    """An .npz of random images, as ADM writes it."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", pixels)
    return NpzSource(path=tmp_path / "reference.npz")
