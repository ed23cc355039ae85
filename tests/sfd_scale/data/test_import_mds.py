"""Shards that MDSWriter wrote become data that training reads; what cannot be read is refused by its column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfd_scale.data.dataloader import DataConfig, LatentLoader
from sfd_scale.data.import_mds import import_data
from sfd_scale.data.mosaic import streaming
from sfd_scale.data.shards import check_data, without_hash
from sfd_scale.runtime.batch_split import BatchSplit

COUNT, SHAPE = 24, (3, 4, 4)
LATENTS = np.random.default_rng(0).normal(2.0, 3.0, (COUNT, *SHAPE)).astype(np.float16)


def write(out: Path, encoding: str = "ndarray:float16:3,4,4", label: str = "int", **settings: Any) -> Path:
    columns = {"label": label, "latents": encoding, "latents_flip": encoding}
    with streaming().MDSWriter(out=str(out), columns=columns, size_limit=2048, **settings) as writer:
        for number, latent in enumerate(LATENTS):
            value = latent.astype(np.dtype(encoding.split(":")[1]))
            kept = str(number) if label == "str" else number % 5
            writer.write({"label": kept, "latents": value, "latents_flip": value[:, :, ::-1].copy()})
    return out


def test_plain_shards_are_read_with_their_own_statistics(tmp_path: Path) -> None:
    write(tmp_path)
    assert without_hash(tmp_path) > 2
    manifest = import_data(tmp_path, image_size=64)
    assert (manifest.num_samples, manifest.num_classes, manifest.dtype) == (COUNT, 5, "float16")
    assert check_data(tmp_path) == []
    loader = LatentLoader(
        DataConfig(path=tmp_path, shuffle=False, flip=False), seed=0, split=BatchSplit(COUNT, 1, 1), rank=0
    )
    batch = next(loader.batches(0))
    values = torch.from_numpy(LATENTS.astype(np.float64))
    both = torch.cat([values, values])
    mean, std = both.mean((0, 2, 3)), both.std((0, 2, 3), correction=0)
    assert (loader.stats.mean - mean).abs().max() < 1e-9 and (loader.stats.std / std - 1).abs().max() < 0.01
    raw = loader.stats.denormalize(batch.latents)
    assert (raw - values).abs().max() < 1e-2 and batch.labels.tolist() == [n % 5 for n in range(COUNT)]
    with pytest.raises(ValueError, match=r"it has a manifest\.json already"):
        import_data(tmp_path, image_size=64)


def test_columns_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"column 'latents' is ndarray:float32:3,4,4; allowed: float16, or uint16"):
        import_data(write(tmp_path / "wide", "ndarray:float32:3,4,4"), image_size=64)
    with pytest.raises(ValueError, match=r"column 'label' has the encoding 'str'"):
        import_data(write(tmp_path / "text", label="str"), image_size=64)
    with pytest.raises(ValueError, match=r"--num-classes: 3, but a label is 4"):
        import_data(write(tmp_path / "few"), image_size=64, num_classes=3)
