"""Latents: channel order, statistics and batches. Only latents.py splits channels, only schedule.py shifts clocks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfd_scale.data.batches import ImageBatch, LatentBatch
from sfd_scale.diffusion.latents import LatentLayout, LatentStats, StatsAccumulator

LAYOUT = LatentLayout(texture_channels=3, semantic_channels=2, size=4)
PACKAGE = Path(__file__).parents[3] / "sfd_scale"
EVAL = PACKAGE.parent / "eval"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_texture_is_first() -> None:
    x = torch.arange(5.0).reshape(1, 5, 1, 1)
    texture, semantic = LAYOUT.split(x)
    assert texture.flatten().tolist() == [0, 1, 2] and semantic.flatten().tolist() == [3, 4]
    assert torch.equal(LAYOUT.join(texture, semantic), x)
    assert LAYOUT.channels == 5 and LAYOUT.shape == (5, 4, 4)


def test_split_follows_dim_and_refuses_other_widths() -> None:
    assert LAYOUT.split(torch.zeros(5, 7), dim=0)[1].shape == (2, 7)
    with pytest.raises(ValueError, match="latents have 6 channels; allowed: 5"):
        LAYOUT.split(torch.zeros(1, 6, 1, 1))


def test_per_channel_repeats_one_value_per_part_and_sample() -> None:
    like = torch.zeros(2, 5, 4, 4)
    spread = LAYOUT.per_channel(torch.tensor([0.1, 0.2]), 7, like=like)
    assert spread.shape == (2, 5, 1, 1)
    assert spread[:, :, 0, 0].tolist() == torch.tensor([[0.1, 0.1, 0.1, 7, 7], [0.2, 0.2, 0.2, 7, 7]]).tolist()
    mask = LAYOUT.per_channel(torch.tensor([True, False]), torch.tensor([False, True]), like=like)
    assert mask.dtype == like.dtype and mask[:, :, 0, 0].tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    assert LAYOUT.per_channel(1.0, 2.0, like=like).shape == (1, 5, 1, 1)


def test_a_layout_without_semantics_is_whole() -> None:
    layout = LatentLayout(texture_channels=3, semantic_channels=0, size=4)
    assert layout.split(torch.zeros(1, 3, 4, 4))[1].numel() == 0
    assert layout.per_channel(2.0, 9.0, like=torch.zeros(1)).flatten().tolist() == [2, 2, 2]


@pytest.mark.parametrize("field", ["texture_channels", "semantic_channels", "size"])
def test_impossible_layouts_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: -1; allowed"):
        LatentLayout(**{field: -1})


def test_accumulated_statistics_are_those_of_the_whole() -> None:
    # Far from zero, so that a float32 sum of squares would be wrong in the third digit.
    x = 1000 + normal(50, 5, 4, 4) * torch.tensor([1.0, 2, 3, 4, 5])[:, None, None]
    parts = [StatsAccumulator(5) for _ in range(3)]
    for part, chunk in zip(parts, x.split([7, 30, 13]), strict=True):
        for batch in chunk.split(4):
            part.update(batch)
    parts[0].merge(parts[1])
    parts[0].merge(StatsAccumulator.from_state(parts[2].state()))
    stats, whole = parts[0].finish(), x.double()
    torch.testing.assert_close(stats.mean, whole.mean((0, 2, 3)), rtol=1e-13, atol=0)
    torch.testing.assert_close(stats.std, whole.std((0, 2, 3), correction=0), rtol=1e-10, atol=0)


def test_no_samples_have_no_statistics() -> None:
    with pytest.raises(ValueError, match="no samples"):
        StatsAccumulator(5).finish()


def test_normalised_latents_have_mean_0_and_std_1() -> None:
    x = 3 + 2 * normal(20, 5, 4, 4)
    accumulator = StatsAccumulator(5)
    accumulator.update(x)
    stats = accumulator.finish()
    z = stats.normalize(x)
    assert z.dtype == torch.float32
    assert z.mean((0, 2, 3)).abs().max() < 1e-6 and (z.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-6
    torch.testing.assert_close(stats.denormalize(z), x)


def test_a_file_of_statistics_keeps_their_hash_and_any_bit_changes_it(tmp_path: Path) -> None:
    stats = LatentStats(normal(5).double(), normal(5).double().abs() + 0.1)
    stats.save(tmp_path / "stats.safetensors")
    assert LatentStats.load(tmp_path / "stats.safetensors").hash == stats.hash
    nudged = stats.std.clone()
    nudged[4] = torch.nextafter(nudged[4], nudged[4] + 1)
    assert LatentStats(stats.mean, nudged).hash != stats.hash


def test_official_statistics_are_read_texture_first(tmp_path: Path) -> None:
    for name, channels, value in (("texture", 3, 1.0), ("semantic", 2, 5.0)):
        shape = (1, channels, 1, 1)
        torch.save({"mean": torch.full(shape, value), "std": torch.full(shape, value + 1)}, tmp_path / name)
    stats = LatentStats.from_official(tmp_path / "texture", tmp_path / "semantic")
    assert stats.mean.tolist() == [1, 1, 1, 5, 5] and stats.std.tolist() == [2, 2, 2, 6, 6]
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    torch.save({"mean": 1.0}, tmp_path / "other")
    for name, message in (("pointer", "pointer is a Git-LFS pointer"), ("other", "other: no latent statistics")):
        with pytest.raises(ValueError, match=message):
            LatentStats.from_official(tmp_path / "texture", tmp_path / name)


@pytest.mark.parametrize(
    ("mean", "std"), [([0.0], [0.0]), ([float("nan")], [1.0]), ([0.0], [float("inf")]), ([0.0, 0.0], [1.0])]
)
def test_unusable_statistics_are_refused(mean: list[float], std: list[float]) -> None:
    with pytest.raises(ValueError, match="statistics|channel"):
        LatentStats(torch.tensor(mean), torch.tensor(std))


@pytest.mark.parametrize("value", [0.0, 0.1, -123.456, 1e-3, 7e4])
def test_constant_channels_are_named(value: float) -> None:
    """ComfyUI-LTXVideo#540. The mean of equal numbers is rounded, so their std is often not exactly 0."""
    latents = normal(7, 12, 3, 3)
    latents[:, [2, 5, 6, 7, 11]] = value
    accumulator = StatsAccumulator(12)
    for part in latents.split([3, 1, 3]):
        accumulator.update(part)
    assert accumulator.constant_channels() == [2, 5, 6, 7, 11]
    with pytest.raises(ValueError, match="latent channels 2, 5-7, 11 of 12: constant, .* usual causes: an encoder wi"):
        accumulator.finish()
    near = normal(7, 2, 3, 3) * 1e-4 + 1.0  # a small deviation is not a constant
    accumulator = StatsAccumulator(2)
    accumulator.update(near)
    assert accumulator.finish().std.tolist() == pytest.approx(near.double().std((0, 2, 3), correction=0).tolist())


def test_files_of_statistics_name_themselves_and_their_channels(tmp_path: Path) -> None:
    for name, mean, std, message in (
        ("zero", [0.0, 1.0, 2.0], [1.0, 0.0, 1.0], r"zero: latent channel 1 of 3: constant"),
        (
            "nan",
            [0.0, float("nan"), 2.0],
            [1.0, 1.0, float("inf")],
            r"nan: latent channels 1-2 of 3: mean or std is not",
        ),
    ):
        save_file({"mean": torch.tensor(mean), "std": torch.tensor(std)}, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            LatentStats.load(tmp_path / name)
    save_file({"mean": torch.ones(3)}, tmp_path / "half")
    with pytest.raises(ValueError, match="half: not latent statistics: it has mean, not mean and std"):
        LatentStats.load(tmp_path / "half")
    for name, std in (("texture", 1.0), ("semantic", 0.0)):
        torch.save({"mean": torch.ones(1, 2, 1, 1), "std": torch.full((1, 2, 1, 1), std)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"texture \(the first 2 channels\), .*semantic: latent channels 2-3 of 4"):
        LatentStats.from_official(tmp_path / "texture", tmp_path / "semantic")


def test_batches_slice_all_their_columns_and_keep_keys_on_the_cpu() -> None:
    keys = torch.arange(12).reshape(6, 2)
    batch = LatentBatch(normal(6, 5, 4, 4), torch.arange(6), keys, normal(6, 8, 4, 4))
    part = batch.slice(2, 4).to(torch.device("cpu"))
    assert len(part) == 2 and part.labels.tolist() == [2, 3] and torch.equal(part.keys, keys[2:4])
    assert part.features is not None and batch.features is not None
    assert torch.equal(part.features, batch.features[2:4]) and torch.equal(part.latents, batch.latents[2:4])
    images = ImageBatch(torch.zeros(6, 3, 2, 2, dtype=torch.uint8), torch.arange(6), keys)
    assert images.slice(4, 6).labels.tolist() == [4, 5] and len(images) == 6
    if torch.cuda.is_available():
        assert batch.to(torch.device("cuda")).keys.device.type == "cpu"


def _names(node: ast.AST) -> set[str]:
    found = (
        n.attr if isinstance(n, ast.Attribute) else n.id if isinstance(n, ast.Name) else "" for n in ast.walk(node)
    )
    return set(found)


def channel_slices(tree: ast.AST) -> list[int]:
    """Lines that index, split or narrow by a part's channel count."""
    widths, cutters = {"semantic_channels", "texture_channels"}, {"split", "narrow", "tensor_split"}
    lines = []
    for node in ast.walk(tree):
        indexes = isinstance(node, ast.Subscript) and _names(node.slice) & widths
        cuts = (
            isinstance(node, ast.Call)
            and _names(node.func) & cutters
            and any(_names(a) & widths for a in [*node.args, *(k.value for k in node.keywords)])
        )
        if indexes or cuts:
            lines.append(node.lineno)
    return lines


def clock_arithmetic(tree: ast.AST) -> list[int]:
    """Lines that add to, take from or scale by delta_t."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp | ast.AugAssign) and "delta_t" in _names(node)
    ]


def test_the_checks_of_the_next_test_find_violations() -> None:
    assert channel_slices(ast.parse("a = x[:, -layout.semantic_channels:]\nb = x.narrow(1, 0, texture_channels)")) == [
        1,
        2,
    ]
    assert clock_arithmetic(ast.parse("t = g - schedule.delta_t\nend = 1 + delta_t")) == [1, 2]


@pytest.mark.parametrize(
    ("find", "owner"), [(channel_slices, "diffusion/latents.py"), (clock_arithmetic, "diffusion/schedule.py")]
)
def test_one_owner_for_channels_and_for_clocks(find, owner: str) -> None:  # type: ignore[no-untyped-def]
    files = [path for folder in (PACKAGE, EVAL) for path in sorted(folder.rglob("*.py")) if path != PACKAGE / owner]
    found = {str(path): find(ast.parse(path.read_text())) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}
    assert find(ast.parse((PACKAGE / owner).read_text())) != []
