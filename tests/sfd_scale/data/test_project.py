"""`sfd init`: its recipes are valid, its commands parse, and mistakes about the folder of images are named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from torchvision.utils import save_image

from eval.recipes import load_any
from sfd_scale.data.project import init
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


def test_enlarging_is_said(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        init("same", images, 32)
        assert not caplog.records
        init("large", images, 128)
    assert "enlarged 4.0 times" in caplog.text
