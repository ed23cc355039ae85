"""A few images that prove a result: their noise, label and pixels as hashes, for `eval verify`."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.work.chunks import ChunkFolder

EACH = 4  # images of the first chunk, and of the last
SMALL = 16  # pixels of a side of the small copy
_NUMBERS, _NOISE, _PIXELS, _SMALL = "proof_numbers", "proof_noise", "proof_pixels", "proof_small"


@dataclass(frozen=True, kw_only=True)
class ImageProof:
    """One image of a result.

    noise, pixels: SHA-256 of the starting noise (C, H, W) float32, and of the image (3, H', W') uint8.
    small: the image as 16 × 16 block means, (3, 16, 16) uint8 in base64, for other hardware.
    """

    number: int
    label: int
    noise: str
    pixels: str
    small: str

    def __post_init__(self) -> None:
        try:
            whole = len(base64.b64decode(self.small, validate=True)) == 3 * SMALL**2
        except ValueError:
            whole = False
        if not whole:
            raise ValueError(f"small: {self.small[:20]!r}…; allowed: {3 * SMALL**2} bytes in base64")

    def distance(self, image: Tensor) -> float:
        """Mean distance of the block means to those of another image (3, H', W') uint8, in levels of 255."""
        kept = torch.frombuffer(bytearray(base64.b64decode(self.small)), dtype=torch.uint8)
        return (small_copy(image).float().flatten() - kept.float()).abs().mean().item()


def proven_rows(rows: range, total: int) -> list[int]:
    """The numbers of the images of a chunk that prove its result: none, but in the first and the last chunk."""
    if rows.start != 0 and rows.stop != total:
        return []
    count = min(EACH, len(rows))
    return [rows.start + number * len(rows) // count for number in range(count)]


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def small_copy(image: Tensor) -> Tensor:
    """Block means of an image (3, H', W') uint8: (3, 16, 16) uint8."""
    means = torch.nn.functional.adaptive_avg_pool2d(image.float(), SMALL)
    return means.round().to(torch.uint8)


def proof_tensors(numbers: Sequence[int], noise: Tensor, images: Tensor) -> dict[str, Tensor]:
    """What a chunk keeps of its proven images: noise (N, C, H, W) float32 and images (N, 3, H', W') uint8, on the CPU.

    Empty without images.
    """
    if not numbers:
        return {}

    def digests(tensors: Tensor) -> Tensor:
        return torch.stack([torch.tensor(list(bytes.fromhex(sha256(one))), dtype=torch.uint8) for one in tensors])

    small = torch.stack([small_copy(image) for image in images])
    return {
        _NUMBERS: torch.tensor(list(numbers)), _NOISE: digests(noise), _PIXELS: digests(images), _SMALL: small,
    }  # fmt: skip


def read_proofs(folder: ChunkFolder) -> tuple[ImageProof, ...]:
    """The proven images of a complete folder of `generate`; none for given images, and for older folders."""
    found: list[ImageProof] = []
    for chunk in sorted({0, folder.count - 1}):
        if _NUMBERS not in folder.names(chunk):
            continue
        numbers, noise, pixels, small, labels = (
            next(folder.read(name, [chunk])) for name in (_NUMBERS, _NOISE, _PIXELS, _SMALL, "labels")
        )
        for row, number in enumerate(numbers.tolist()):
            found.append(
                ImageProof(
                    number=number, label=int(labels[number - folder.rows(chunk).start]),
                    noise=bytes(noise[row].tolist()).hex(), pixels=bytes(pixels[row].tolist()).hex(),
                    small=base64.b64encode(small[row].numpy().tobytes()).decode(),
                )
            )  # fmt: skip
    return tuple(found)
