"""Reading images: colour modes and depths, damaged metadata, strips, and the listing of odd folders."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eval.images.sources import FlatSource, open_images
from sfd_scale.data import image_io
from sfd_scale.data.image_files import list_files
from sfd_scale.data.image_io import UnreadableImage, centre_crop, read_image, read_whole_image, to_rgb
from sfd_scale.data.image_metadata import without_metadata
from sfd_scale.data.parquet import ParquetConfig
from sfd_scale.data.sources import FolderConfig, ImageFolder, make_source
from sfd_scale.data.tars import TarConfig
from tests.helpers.png import png_chunk, write_png

COLOURS = {0: 1, 2: 3, 4: 2, 6: 4}  # channels by colour type of PNG


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)


def whole_resize(image: Image.Image, size: int) -> Image.Image:
    """The rule of the crop, without bounds."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([0, 2, 4, 6]), st.sampled_from([8, 16]), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_png_of_every_depth_give_the_high_byte_and_drop_alpha(
    colour: int, depth: int, width: int, height: int, keyed: bool
) -> None:
    channels = COLOURS[colour]
    stored = np.random.default_rng(colour + width).integers(0, 2**depth, (height, width, channels))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.png"
        raw = stored.astype(">u2" if depth == 16 else ">u1").tobytes()
        key = stored[0, 0].astype(">u2").tobytes()
        write_png(path, width, height, depth, colour, raw, [(b"tRNS", key)] if keyed and channels in (1, 3) else [])
        found = read_whole_image(path)
    high = torch.from_numpy((stored >> (depth - 8)).astype(np.uint8)).permute(2, 0, 1)
    assert torch.equal(found, high[:3] if channels >= 3 else high[:1].expand(3, -1, -1))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_png_of_few_bits_use_the_whole_range(tmp_path: Path, depth: int) -> None:
    write_png(tmp_path / "a.png", 2, 1, depth, 0, bytes([(2**depth - 1) << (8 - depth)]))
    assert read_whole_image(tmp_path / "a.png")[0, 0].tolist() == [255, 0]


@pytest.mark.parametrize("transparency", [b"\0", b"\0\xff", b"\0" * 300])
def test_a_palette_gives_its_colours_whatever_its_transparency(tmp_path: Path, transparency: bytes) -> None:
    palette = (b"PLTE", bytes([10, 20, 30, 40, 50, 60]))
    write_png(tmp_path / "a.png", 2, 1, 8, 3, b"\0\1", [palette, (b"tRNS", transparency)])
    assert read_whole_image(tmp_path / "a.png")[:, 0].T.tolist() == [[10, 20, 30], [40, 50, 60]]


def test_modes_of_pillow_follow_the_rules_of_the_docstring() -> None:
    def first(values: np.ndarray) -> list[int]:
        return [int(value) for value in np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0]]

    assert first(np.array([[0, 255, 256, 65535]], np.uint16)) == [0, 0, 1, 255]
    assert first(np.array([[-5, 256, 65535, 1 << 20]], np.int32)) == [0, 1, 255, 255]
    assert first(np.array([[-1.0, 0.5, 1.0, 7.0, np.nan, np.inf]], np.float32)) == [0, 128, 255, 255, 0, 255]
    assert first(np.array([[False, True]])) == [0, 255]
    for mode in ("L", "LA", "P", "RGBA", "CMYK", "1"):
        image = Image.fromarray(noise(5, 4)).convert(mode)
        assert to_rgb(image.copy()).tobytes() == image.convert("RGB").tobytes()


PNG_DAMAGE = {
    "text": png_chunk(b"tEXt", b"key\0value")[:-1] + b"?",
    "compressed text": png_chunk(b"zTXt", b"key\0\0no zlib data"),
    "a text bomb": png_chunk(b"zTXt", b"key\0\x00" + zlib.compress(bytes(1 << 21))),
    "profile": png_chunk(b"iCCP", b"name\0\7x"),
    "EXIF": png_chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "EXIF without a head": png_chunk(b"eXIf", b"nonsense"),
    "XMP": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0not deflated"),
    "size": png_chunk(b"pHYs", b"\0"),
    "animation": png_chunk(b"acTL", b"\0"),
}


@pytest.mark.parametrize("damage", PNG_DAMAGE)
@pytest.mark.parametrize("place", ["before", "after"])
def test_damaged_metadata_of_png_do_not_matter(tmp_path: Path, damage: str, place: str) -> None:
    out = io.BytesIO()
    Image.fromarray(noise(6, 5)).save(out, "png")
    data = out.getvalue()
    at = 33 if place == "before" else len(data) - 12
    (tmp_path / "a.png").write_bytes(data[:at] + PNG_DAMAGE[damage] + data[at:])
    expected = torch.from_numpy(noise(6, 5)).permute(2, 0, 1)
    assert torch.equal(read_whole_image(tmp_path / "a.png"), expected)
    assert torch.equal(read_whole_image(io.BytesIO((tmp_path / "a.png").read_bytes()), name="x"), expected)


@pytest.mark.parametrize("marker", [0xE1, 0xE2, 0xED, 0xFE])
@pytest.mark.parametrize(
    "body", [b"", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"ICC_PROFILE\0\2", b"Photoshop 3.0\x008BIM\4"]
)
def test_damaged_metadata_of_jpeg_do_not_matter(tmp_path: Path, marker: int, body: bytes) -> None:
    out = io.BytesIO()
    Image.fromarray(noise(16, 16)).save(out, "jpeg")
    data = out.getvalue()
    segment = bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body
    (tmp_path / "a.jpg").write_bytes(data[:2] + segment + data[2:])
    assert torch.equal(read_whole_image(tmp_path / "a.jpg"), read_whole_image(io.BytesIO(data)))


@pytest.mark.parametrize(("form", "lossless"), [("png", True), ("jpeg", True), ("webp", True), ("webp", False)])
def test_a_file_without_metadata_has_the_same_pixels(form: str, lossless: bool) -> None:
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 1
    options = {"lossless": lossless} if form == "webp" else {}
    Image.fromarray(noise(16, 12, 3 if form == "jpeg" else 4)).save(
        out, form, exif=exif, icc_profile=b"x" * 200, **options
    )
    bare = without_metadata(out.getvalue())
    assert bare is not None and b"x" * 200 not in bare and len(bare) < len(out.getvalue())
    assert torch.equal(read_whole_image(io.BytesIO(bare)), read_whole_image(io.BytesIO(out.getvalue())))
    with pytest.raises(UnreadableImage, match="cut"):
        read_whole_image(io.BytesIO(out.getvalue()[:-40]), name="cut")


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 40), st.integers(1, 700), st.integers(1, 24), st.booleans())
def test_the_crop_of_any_size_is_the_crop_of_the_whole_picture(short: int, long: int, size: int, wide: bool) -> None:
    width, height = (long, short) if wide else (short, long)
    image = Image.fromarray(noise(width, height))
    assert centre_crop(image, size).tobytes() == whole_resize(image, size).tobytes()


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 24), st.integers(1, 3000), st.integers(1, 48), st.booleans())
def test_the_crop_of_a_strip_is_the_crop_of_the_whole_picture(short: int, long: int, size: int, wide: bool) -> None:
    width, height = (long, short) if wide else (short, long)
    image = Image.fromarray(noise(width, height))
    limit = image_io.MAX_RESIZED_PIXELS
    try:
        image_io.MAX_RESIZED_PIXELS = 0  # type: ignore[misc]
        found = centre_crop(image, size).tobytes()
    finally:
        image_io.MAX_RESIZED_PIXELS = limit  # type: ignore[misc]
    assert found == whole_resize(image, size).tobytes()


@pytest.mark.parametrize(("width", "height"), [(1, 60000), (60000, 1), (3, 50000)])
def test_a_strip_takes_little_memory(tmp_path: Path, width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """InternVL#1256: 1x60000 pixels took 1.88 GB at size 64."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[height // 2 :, width // 2 :] = (255, 128, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    sizes = []
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *rest: object, **more: object) -> Image.Image:
        sizes.append(size[0] * size[1])
        return resize(self, size, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", watched)
    tracemalloc.start()
    found = read_image(tmp_path / "a.png", 256)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20, "NumPy's; Pillow's is not traced"
    tracemalloc.stop()
    assert max(sizes, default=0) <= image_io.MAX_RESIZED_PIXELS
    assert found[:, 0, 0].tolist() == [0, 0, 0] and found[:, -1, -1].tolist() == [255, 128, 0]


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(4, 4)).save(folder / name, "png")


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_files(folder).files]


def test_a_listing_follows_links_once_and_ends_cycles(tmp_path: Path) -> None:
    fill(tmp_path, "other/z.png", "root/a/1.png", "root/b/2.PNG", "root/.git/3.png", "root/a/._1.png")
    root = tmp_path / "root"
    (root / "a" / "self").symlink_to(root / "a")
    (root / "b" / "up").symlink_to(root)
    (root / "c").symlink_to(tmp_path / "other")
    (root / "d").symlink_to(tmp_path / "other")
    (root / "e.png").symlink_to(tmp_path / "other" / "z.png")
    (root / "gone.png").symlink_to(tmp_path / "absent")
    (root / "f.png").mkdir()
    fill(root, "f.png/4.png", "notes.txt")
    os.mkfifo(root / "pipe.png")
    listing = list_files(root)
    assert names(root) == ["a/1.png", "b/2.PNG", "c/z.png", "e.png", "f.png/4.png", "gone.png"]
    assert listing.others.counts == {
        "links to a folder above or read already": 3,
        "devices, pipes or sockets": 1,
        ".txt": 1,
        "hidden": 2,
    }


def test_links_to_links_do_not_grow_without_bound(tmp_path: Path) -> None:
    for level in range(30):
        (tmp_path / f"{level}").mkdir()
        for link in "ab":
            (tmp_path / f"{level}" / link).symlink_to(tmp_path / f"{level + 1}")
    fill(tmp_path, "30/x.png")
    assert len(list_files(tmp_path / "0").files) == 1


def test_a_class_that_links_to_the_whole_folder_is_no_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "in/c0/1.png", "in/c1/2.png", "in/top.png", "in/readme.md")
    (tmp_path / "in" / "c2").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "c1" / "up").symlink_to("..")
    source = ImageFolder(FolderConfig(path=tmp_path / "in", size=4))
    assert source.classes == ("c0", "c1") and [label for _, label in source.files] == [0, 1]
    assert "2 links to a folder above or read already (c2, c1/up)" in caplog.text
    assert "1 .png beside the class folders (top.png)" in caplog.text and "(readme.md)" in caplog.text


NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, st.sampled_from(["image", "folder", "link", "cycle", "other", "empty"]), max_size=8))
def test_a_listing_of_odd_folders_is_what_a_plain_walk_finds(entries: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        root, elsewhere = Path(place) / "root", Path(place) / "elsewhere"
        root.mkdir()
        elsewhere.mkdir()
        (elsewhere / "x.png").touch()
        expected, linked = [], False
        for name, kind in sorted(entries.items(), key=lambda entry: os.fsencode(f"n{entry[0]}")):
            path, relative = root / f"n{name}", f"n{name}"
            if kind == "image":
                path.with_name(f"{path.name}.png").touch()
                expected.append(f"{relative}.png")
            elif kind == "folder":
                path.mkdir()
                (path / "y.JPG").touch()
                expected.append(f"{relative}/y.JPG")
            elif kind == "link":
                path.symlink_to(elsewhere)
                expected += [] if linked else [f"{relative}/x.png"]
                linked = True
            elif kind == "cycle":
                path.symlink_to(root)
            elif kind == "empty":
                path.mkdir()
            else:
                path.with_name(f"{path.name}.txt").touch()
        found = [os.fsencode(file.relative_to(root)) for file in list_files(root).files]
        assert found == sorted(map(os.fsencode, expected), key=lambda name: name.split(b"/"))


def test_names_that_are_not_utf8_are_read_and_known(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/c\xff"
    os.mkdir(folder)
    fill(tmp_path, "x.png")
    os.rename(tmp_path / "x.png", folder + b"/\xfe.png")
    source = ImageFolder(FolderConfig(path=tmp_path, size=4))
    assert len(source) == 1 and source[0][0].shape == (3, 4, 4)


MODES = {"png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "bmp": ("1", "L", "P", "RGB"), "jpeg": ("L", "RGB")}


@st.composite
def odd_images(draw: st.DrawFn) -> tuple[bytes, Image.Image]:
    """A lossless file or a JPEG of any mode, size and metadata, and its picture as Pillow has it."""
    form = draw(st.sampled_from(list(MODES)))
    mode = draw(st.sampled_from(MODES[form]))
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    pixels = noise(width, height)
    if mode == "I;16":
        high = pixels[:, :, 0].astype(np.uint16) << 8
        picture = Image.fromarray(high + pixels[:, :, 1])
    else:
        picture = Image.fromarray(pixels).convert(mode)
    options: dict[str, Any] = {}
    if form != "bmp" and draw(st.booleans()):
        exif = Image.Exif()
        exif[0x0112] = draw(st.sampled_from([1, 3, 6, 8, 99]))
        options = {"exif": exif, "icc_profile": draw(st.binary(max_size=40)), "dpi": (72, 72)}
    out = io.BytesIO()
    picture.save(out, form, **options)
    data = out.getvalue()
    return data, to_rgb(Image.open(io.BytesIO(data)))


@settings(deadline=None, max_examples=40)
@given(odd_images(), NAMES, st.sampled_from([".png", ".JPG", ".bmp", ".webp"]))
def test_an_odd_image_has_the_same_pixels_in_every_source(
    drawn: tuple[bytes, Image.Image], name: str, suffix: str
) -> None:
    """Encoding and scoring read one picture, whatever its mode, metadata, name and suffix, and where it lies."""
    data, picture = drawn
    name = os.fsdecode(os.fsencode(f"n{name}")[:200]) + suffix
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "c" / "0"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(data)
        with tarfile.open(Path(place) / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            archive.add(folder / name, name)
        pq.write_table(pa.table({"image": [data], "label": [0]}), Path(place) / "x.parquet")
        sources = [
            make_source(FolderConfig(path=folder.parent, size=8, upright=False)),
            make_source(TarConfig(path=Path(place) / "x.tar", size=8, upright=False)),
            make_source(ParquetConfig(path=Path(place) / "x.parquet", size=8, upright=False)),
        ]
        expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert torch.equal(open_images(FlatSource(path=folder)).rows(range(1))[0][0], expected)
        cropped = torch.from_numpy(np.array(centre_crop(picture, 8))).permute(2, 0, 1)
        for source in sources:
            assert torch.equal(source[0][0], cropped) and source[0][1] == 0


@settings(deadline=None, max_examples=60)
@given(odd_images(), st.data())
def test_an_odd_image_with_changed_bytes_is_read_or_named(
    drawn: tuple[bytes, Image.Image], data: st.DataObject
) -> None:
    content = bytearray(drawn[0])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(content[: data.draw(st.integers(0, len(content)))])
    for changed in (bytes(content), cut):
        try:
            assert read_image(io.BytesIO(changed), 8, name="odd.png").shape == (3, 8, 8)
        except UnreadableImage as error:
            assert "odd.png" in str(error)


def test_files_that_are_left_out_are_named_by_every_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The number and the first names: another suffix, another folder, hidden, links in archives."""
    fill(tmp_path, "flat/1.png", "flat/sub/2.png")
    (tmp_path / "flat" / "3.tif").touch()
    open_images(FlatSource(path=tmp_path / "flat"))
    assert "flat: left out: " in caplog.text and "1 folders (sub)" in caplog.text and "1 .tif (3.tif)" in caplog.text
    caplog.clear()
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as archive:
        archive.add(tmp_path / "flat" / "1.png", "1.png")
        for number in range(4):
            archive.add(tmp_path / "flat" / "3.tif", f"{number}.tif")
    (tmp_path / "tars" / "b.tar.gz").touch()
    make_source(TarConfig(path=tmp_path / "tars", size=4))
    assert "1 .gz (b.tar.gz)" in caplog.text and "4 .tif in tar files (0.tif, 1.tif, 2.tif, ...)" in caplog.text
    caplog.clear()
    (tmp_path / "parquet" / "more").mkdir(parents=True)
    table = pa.table({"image": [(tmp_path / "flat" / "1.png").read_bytes()], "label": [0]})
    for name in ("train-0.parquet", "more/train-1.parquet", "test-0.parquet"):
        pq.write_table(table, tmp_path / "parquet" / name)
    (tmp_path / "parquet" / "README.md").touch()
    make_source(ParquetConfig(path=tmp_path / "parquet", size=4, files="train-*.parquet"))
    assert "2 .parquet of another name or folder (" in caplog.text and "more/train-1.parquet" in caplog.text
    assert "1 .md (README.md); read: train-*.parquet" in caplog.text
