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


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": "ndarray:uint8:3,32,32"},
            r"'image' has the shape \(3, 32, 32\), with --image-size 64; allowed: \(3, 6",
        ),
        ({"image": "ndarray:uint8:64,64,3"}, r"'image' has the shape \(64, 64, 3\).*channels first"),
        ({"latents": "ndarray:float16:48"}, r"'latents' has the shape \(48,\); allowed: \(channels, height, width\)"),
        (
            {"features": "ndarray:float16:6,4,4", "features_flip": "ndarray:float16:6,4,5"},
            r"'features_flip' has the shape \(6, 4, 5\); allowed: \(6, 4, 4\)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    with streaming().MDSWriter(out=str(tmp_path), columns={"label": "int", **columns}) as writer:
        arrays = {name: form.split(":")[1:] for name, form in columns.items()}
        writer.write({"label": 0} | {n: np.ones([*map(int, s.split(","))], t) for n, (t, s) in arrays.items()})
    with pytest.raises(ValueError, match=message):
        import_data(tmp_path, image_size=64)


def test_an_empty_folder_merged_shards_and_huge_labels_are_refused(tmp_path: Path) -> None:
    """streaming#335 and its kind: an index without shards, or one of merge_index, and labels that take the memory."""
    columns = {"label": "int", "latents": "ndarray:float16:3,4,4"}
    with streaming().MDSWriter(out=str(tmp_path / "empty"), columns=columns):
        pass
    with pytest.raises(ValueError, match="empty: no samples in its 0 shards"):
        import_data(tmp_path / "empty", image_size=64)
    with streaming().MDSWriter(out=str(tmp_path / "large"), columns=columns) as writer:
        writer.write({"label": 1 << 40, "latents": LATENTS[0]})
    with pytest.raises(ValueError, match="large: a label is 1099511627776; allowed: 0 to 1,048,575"):
        import_data(tmp_path / "large", image_size=64)
    write(tmp_path / "merged" / "0")
    index = (tmp_path / "merged" / "0" / "index.json").read_text().replace('"shard.', '"0/shard.')
    (tmp_path / "merged" / "index.json").write_text(index)
    with pytest.raises(ValueError, match=r"'0/shard.00000.mds' lies in another folder, as after merge_index"):
        import_data(tmp_path / "merged", image_size=64)
