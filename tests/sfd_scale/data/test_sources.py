"""Image sources: the crop, orientation, colour modes, and files that are no whole image."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfd_scale.data.image_io import UnreadableImage, centre_crop, read_image
from sfd_scale.data.sources import DigitsConfig, FolderConfig, ImageFolder, MDSConfig, make_source
from sfd_scale.data.tars import TarConfig
from tests.helpers.encoded import digits, encode_digits


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_the_crop_halves_by_boxes_then_resizes_then_cuts() -> None:
    image = noise(150, 90)
    # 90 ≥ 2·40, so once by a box to 75x45; then bicubic to 67x40 (75·40/45 = 66.7); then 13 columns off the left.
    expected = image.resize((75, 45), Image.Resampling.BOX).resize((67, 40), Image.Resampling.BICUBIC)
    assert centre_crop(image, 40).tobytes() == expected.crop((13, 0, 53, 40)).tobytes()
    assert centre_crop(noise(40, 40), 40).tobytes() == noise(40, 40).tobytes()
    assert centre_crop(noise(7, 9), 16).size == (16, 16)


def test_orientation_and_colour_modes(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = (255, 0, 0)  # the upper half is red
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180°
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned, kept = (read_image(tmp_path / "turned.png", 8, upright) for upright in (True, False))
    assert turned[0, 7, 0] == 255 and turned[0, 0, 0] == 0
    assert kept[0, 0, 0] == 255 and kept[0, 7, 0] == 0

    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    cmyk = read_image(tmp_path / "cmyk.jpg", 8)
    assert cmyk[0, 1, 1] > 230 and cmyk[1, 1, 1] < 25 and cmyk[:, 6, 6].max() < 25
    Image.fromarray(pixels).convert("L").save(tmp_path / "grey.jpg", quality=95)
    grey = read_image(tmp_path / "grey.jpg", 8)
    assert grey.shape == (3, 8, 8) and torch.equal(grey[0], grey[1]) and abs(int(grey[0, 1, 1]) - 76) < 4
    exif[0x0112] = 6  # a phone held upright: to be turned by 90° clockwise, so that the red half is on the right
    Image.fromarray(pixels).save(tmp_path / "phone.jpg", exif=exif, quality=95)
    phone = read_image(tmp_path / "phone.jpg", 8)
    assert phone[0, 4, 7] > 230 and phone[0, 4, 0] < 25
    grey16 = np.full((8, 8), 128 * 256, np.uint16)
    Image.fromarray(grey16).save(tmp_path / "grey16.png")
    assert read_image(tmp_path / "grey16.png", 8).unique().tolist() == [128]
    Image.fromarray(pixels).convert("P").save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png", 8)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    noise(64, 64).save(whole)
    data = whole.read_bytes()
    damaged = {"empty": b"", "text": b"no image at all", "cut": data[: len(data) // 2], "head": data[:30]}
    for name, content in damaged.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        with pytest.raises(UnreadableImage, match=f"{name}{suffix}"):
            read_image(path, 32)
    assert read_image(whole, 32).shape == (3, 32, 32)


def test_random_damage_never_raises_anything_else(tmp_path: Path) -> None:
    noise(24, 24).save(tmp_path / "a.png")
    noise(24, 24).save(tmp_path / "a.jpg")
    generator = np.random.Generator(np.random.PCG64(1))
    unreadable = 0
    for suffix in ("png", "jpg"):
        data = bytearray((tmp_path / f"a.{suffix}").read_bytes())
        for _ in range(150):
            broken = bytearray(data)
            for place in generator.integers(0, len(data), 6):
                broken[place] = generator.integers(0, 256)
            (tmp_path / f"b.{suffix}").write_bytes(broken)
            try:
                read_image(tmp_path / f"b.{suffix}", 16)
            except UnreadableImage:
                unreadable += 1
    assert unreadable > 100


def test_a_class_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, count in (("n02", 2), ("n01", 1)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for i in range(count):
            noise(20, 20, seed=i).save(tmp_path / name / "deeper" / f"{i}.png")
    # What editors and systems leave is no class and no image; of the rest, what is no image is counted.
    for name in (
        ".ipynb_checkpoints/1.png",
        "n01/._0.png",
        "n01/.cache/1.png",
        "n01/notes.txt",
        "n02/a.GIF",
        "n02/b.gif",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not an image")
    source = ImageFolder(FolderConfig(path=tmp_path, size=16))
    assert len(source) == 3 and source.num_classes == 2 and source.classes == ("n01", "n02")
    assert caplog.text.count("left out") == 1
    assert "3 hidden (.ipynb_checkpoints, n01/._0.png, n01/.cache); 2 .gif (n02/a.GIF, n02/b.gif); " in caplog.text
    assert "1 .txt (n01/notes.txt); read: .bmp, " in caplog.text
    assert [source[i][1] for i in range(3)] == [0, 1, 1]
    assert source[2][0].shape == (3, 16, 16) and source[2][0].dtype == torch.uint8


def test_what_is_no_class_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source\.path.*absent is not a folder"):
        ImageFolder(FolderConfig(path=tmp_path / "absent"))
    with pytest.raises(ValueError, match="no class folders"):
        ImageFolder(FolderConfig(path=tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no image.*\.png"):
        ImageFolder(FolderConfig(path=tmp_path))


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def png(seed: int) -> bytes:
    out = io.BytesIO()
    noise(20, 20, seed).save(out, "png")
    return out.getvalue()


def test_images_of_tar_files(tmp_path: Path) -> None:
    """WebDataset's form with .cls members, and a file a class; the pixels are those of the same image files."""
    (tmp_path / "plain").mkdir()
    for seed in range(4):
        (tmp_path / "plain" / f"{seed}.png").write_bytes(png(seed))
    pixels = [read_image(tmp_path / "plain" / f"{seed}.png", 16) for seed in range(4)]
    (tmp_path / "web").mkdir()
    for number in range(2):
        members = {}
        for seed in (2 * number, 2 * number + 1):
            members |= {f"a/{seed}.png": png(seed), f"a/{seed}.cls": str(7 - seed).encode(), f"a/{seed}.json": b"{}"}
        tar_of(tmp_path / "web" / f"train-{number:03d}.tar", members)
    web = make_source(TarConfig(path=tmp_path / "web", size=16))
    assert len(web) == 4 and web.num_classes == 8 and [web[i][1] for i in range(4)] == [7, 6, 5, 4]
    assert all(torch.equal(web[i][0], pixels[i]) for i in range(4))

    (tmp_path / "classes").mkdir()
    tar_of(tmp_path / "classes" / "n02.tar", {"x.JPEG.png": png(2), "y.png": png(3)})
    tar_of(tmp_path / "classes" / "n01.tar", {"x.png": png(0)})
    classes = make_source(TarConfig(path=tmp_path / "classes", size=16))
    assert classes.num_classes == 2 and [classes[i][1] for i in range(3)] == [0, 1, 1]
    assert torch.equal(classes[1][0], pixels[2])


def test_tar_files_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source\.path: .*absent is neither a tar file nor a folder"):
        make_source(TarConfig(path=tmp_path / "absent"))
    (tmp_path / "text.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"text\.tar is a text file .*, not an uncompressed tar file"):
        make_source(TarConfig(path=tmp_path / "text.tar"))
    tar_of(tmp_path / "empty.tar", {"notes.txt": b"x"})
    with pytest.raises(ValueError, match=r"empty\.tar: has no image"):
        make_source(TarConfig(path=tmp_path / "empty.tar"))
    tar_of(tmp_path / "half.tar", {"0.png": png(0), "0.cls": b"1", "1.png": png(1)})
    with pytest.raises(ValueError, match=r"half\.tar: 1\.png has no class"):
        make_source(TarConfig(path=tmp_path / "half.tar"))
    (tmp_path / "mixed").mkdir()
    tar_of(tmp_path / "mixed" / "a.tar", {"x.png": png(0), "x.cls": b"7"})
    tar_of(tmp_path / "mixed" / "b.tar", {"x.png": png(0)})
    with pytest.raises(ValueError, match=r"b\.tar: has no \.cls members, but .*a\.tar has"):
        make_source(TarConfig(path=tmp_path / "mixed", size=16))
    tar_of(tmp_path / "bad.tar", {"0.png": png(0), "1.png": b"", "2.png": png(1)})
    source = make_source(TarConfig(path=tmp_path / "bad.tar", size=16))
    with pytest.raises(UnreadableImage, match=r"bad\.tar: 1\.png is empty"):
        source[1]
    whole = (tmp_path / "bad.tar").read_bytes()
    (tmp_path / "bad.tar").write_bytes(whole[:700])
    with pytest.raises(UnreadableImage, match=r"bad\.tar: 0\.png: truncated"):
        source[0]


def test_a_tar_file_that_ends_too_early_or_too_late_is_refused(tmp_path: Path) -> None:
    """python/cpython#120740: tarfile stops at a damaged or missing header, and the images after it are lost."""
    tar_of(tmp_path / "whole.tar", {f"{seed}.png": png(seed) for seed in range(4)})
    whole = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        third = tar.getmembers()[2].offset
    end = -(-len(whole.rstrip(b"\0")) // 512) * 512
    flipped, blank = bytearray(whole), bytearray(whole)
    flipped[third + 148] ^= 1
    blank[third : third + 512] = bytes(512)
    damaged = {
        "is truncated: it has no end mark": [whole[:third], whole[: third + 200], whole[:end]],
        f"is damaged: byte {third:,} begins no member": [bytes(flipped)],
        "more data after its end mark": [bytes(blank), whole + whole],
    }
    for message, contents in damaged.items():
        for content in contents:
            file = tmp_path / "damaged.tar"
            file.write_bytes(content)
            with pytest.raises(ValueError, match=rf"damaged\.tar:? {message}"):
                make_source(TarConfig(path=file, size=16))
    (tmp_path / "short.tar").write_bytes(whole[: end + 512])
    assert len(make_source(TarConfig(path=tmp_path / "short.tar", size=16))) == 4, "some programs write one zero block"


def test_members_of_a_tar_file_count_as_unpacked_files_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """webdataset#157: one name twice. Unpacked, the last one stays; hidden files are left out, as in a folder."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        names = [("0.png", 0), ("1.png", 1), ("0.png", 2), ("._1.png", 3), ("./x/._2.png", 3), (".cache/3.png", 3)]
        for name, content in [*((name, png(seed)) for name, seed in names), ("1.json", b"{}")]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        tar.addfile(link)
    source = make_source(TarConfig(path=tmp_path / "a.tar", size=20))
    assert len(source) == 2
    (tmp_path / "2.png").write_bytes(png(2))
    assert torch.equal(source[0][0], read_image(tmp_path / "2.png", 20))
    for told in (
        "3 hidden",
        "1 replaced by a later member of the same name (0.png)",
        "1 links in tar files (link.png)",
    ):
        assert told in caplog.text
    assert "1 tar files, such as a.tar, have other members beside their images, but no .cls members" in caplog.text
    tar_of(tmp_path / "b.tar", {"0.png": png(0), "0.cls": b"1", "0.jpg": png(1)})
    with pytest.raises(ValueError, match=r"b\.tar: 0\.png and 0\.jpg share 0\.cls; allowed: a \.cls member for one"):
        make_source(TarConfig(path=tmp_path / "b.tar"))


def test_images_come_back_from_shards(tmp_path: Path) -> None:
    encode_digits(tmp_path, 20, image=True, latents="none")
    source = make_source(MDSConfig(path=tmp_path))
    assert len(source) == 20 and source.num_classes == 10 and source.size == 32
    for index in (0, 7, 8, 19):  # both ends of a chunk
        image, label = source[index]
        wanted, wanted_label = digits(20)[index]
        assert torch.equal(image, wanted) and label == wanted_label
    assert len(make_source(DigitsConfig(num_images=5))) == 5
    with pytest.raises(IndexError):
        source[20]


def test_shards_without_images_are_refused(tmp_path: Path) -> None:
    encode_digits(tmp_path, 8)
    with pytest.raises(ValueError, match=r"has no images.*store\.image=true"):
        make_source(MDSConfig(path=tmp_path))


def test_a_folder_one_level_too_high_and_enlarged_images_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "all/train" / name).mkdir(parents=True)
        Image.new("RGB", (20, 30), (number, 0, 0)).save(tmp_path / "all/train" / name / "1.png")
    with caplog.at_level(logging.WARNING):
        assert ImageFolder(FolderConfig(path=tmp_path / "all/train", size=32)).num_classes == 2
        assert not caplog.records
        assert ImageFolder(FolderConfig(path=tmp_path / "all", size=100)).num_classes == 1
    assert "2 folders inside them do; the classes are train" in caplog.text and "enlarged 5.0 times" in caplog.text
