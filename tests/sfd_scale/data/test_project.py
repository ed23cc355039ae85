"""`sfd init`: its recipes are valid, its commands parse, and mistakes about the folder of images are named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from torchvision.utils import save_image

from eval.recipes import load_any
from sfd_scale.data.project import init
from sfd_scale.data.sources import FolderConfig, ImageFolder
from sfd_scale.toy.digits import digit_image


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "all" / "train"
    for index in range(30):
        image, label = digit_image(0, "train", index)
        (root / f"digit{label % 3}").mkdir(parents=True, exist_ok=True)
        save_image(image.float() / 255, str(root / f"digit{label % 3}" / f"{index}.png"))
    return root


@pytest.mark.parametrize(("codec", "size"), [("small", 32), ("small", 64), ("small", 128), ("sfd", 256)])
def test_all_recipes_are_valid_and_have_the_classes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, size: int
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, commands = init("mine", images, size, codec)  # type: ignore[arg-type]
    found = {path.stem: load_any(f"mine/{path.stem}") for path in folder.glob("*.yaml")}
    assert found["train"].model.num_classes == 3 and found["train"].data.path == found["latents"].out
    assert found["eval"].checkpoint == Path("runs/mine/train.safetensors")
    assert found["train"].train.global_batch <= 30
    if codec == "small":
        assert found["vision"].model.grid == found["train"].latents.size == found["texture"].model.grid
        assert found["train"].latents.texture_channels == found["texture"].model.latent_channels
        assert (
            found["images"].source.size == size and found["semvae"].model.input_dim == found["vision"].model.widths[-1]
        )
    named = [word for line in commands for word in line.split() if word.startswith("mine/") and "." not in word]
    assert {word.removeprefix("mine/") for word in named} == set(found)


def test_mistakes_are_named(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"one per class; is .*train the folder of the classes\?"):
        init("mine", images.parent)
    with pytest.raises(ValueError, match="--size: 100; allowed with the codec small: 32, 64, 128"):
        init("mine", images, 100)
    init("mine", images, 32)
    with pytest.raises(ValueError, match="mine: this folder is not empty"):
        init("mine", images, 32)


def test_the_classes_are_those_that_encode_will_find(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mmpretrain#507: a hidden folder of thumbnails or of a notebook was a class, so labels and model did not fit."""
    monkeypatch.chdir(tmp_path)
    thumbnails = images / ".ipynb_checkpoints"
    thumbnails.mkdir()
    for name, place in (("1.png", thumbnails), ("._0.png", images / "digit0")):
        (place / name).write_bytes(next((images / "digit1").iterdir()).read_bytes())
    (images / "digit2" / "more").mkdir()
    for file in list((images / "digit2").glob("*.png")):
        file.rename(images / "digit2" / "more" / file.name)
    folder, _ = init("mine", images, 32)
    found = ImageFolder(FolderConfig(path=images, size=32))
    assert found.num_classes == load_any("mine/vision").model.num_classes == 3
    assert load_any("mine/train").train.global_batch == len(found) // 2 == 15
    for name in ("digit0", "digit1", "digit2"):
        for inner in ("a", "b"):
            (tmp_path / "deep" / name / inner).mkdir(parents=True)
            (tmp_path / "deep" / name / inner / "0.png").write_bytes((images / "digit0" / "._0.png").read_bytes())
    with pytest.raises(ValueError, match=r"3 folders hold no images themselves, but 6 .*is .*digit0 the folder of the"):
        init("deep2", tmp_path / "deep", 32)
    for file in (images / "digit1").glob("*.png"):
        file.rename(file.with_name(f".{file.name}"))
    with pytest.raises(ValueError, match="digit1 holds no images"):
        init("hidden", images, 32)
    assert folder.is_dir()


def test_enlarging_is_said(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        init("same", images, 32)
        assert not caplog.records
        init("large", images, 128)
    assert "enlarged 4.0 times" in caplog.text
