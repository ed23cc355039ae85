"""A published result is drawn again from its card: the same bits, the same within a tolerance, or another one."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.comparison.verify import TOLERANCE, verify
from eval.images.proof import ImageProof, proof_tensors, proven_rows, sha256, small_copy
from eval.recipe import EvalRecipe
from eval.results import Results
from eval.watch import watch
from sfd_scale import config, export, train
from sfd_scale.export import WeightsChoice
from sfd_scale.recipe import TrainRecipe
from tests.eval.test_watch import prepare
from tests.helpers.ranks import run_alone

LONGER = ["wandb.mode=disabled", "optimizer.lr=0.02", "train.steps=8", "checkpoint.every=8"]
Change = Callable[[dict[str, Any]], None]


def evaluated_run(folder: Path) -> None:
    prepare(folder)
    recipe = config.load(folder / "train.yaml", TrainRecipe, [*LONGER, f"run={folder}/run"])
    assert train.train(recipe, folder / "run")
    watch(config.load(folder / "eval.yaml", EvalRecipe), folder / "run", once=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("verify")
    run_alone(evaluated_run, folder, timeout=300.0)
    return folder / "run"


def card(run: Path) -> Path:
    return run / "evaluations" / "step-00000008" / "results.json"


def changed(run: Path, change: Change) -> Path:
    """The card with a change, in the same run."""
    data = json.loads(card(run).read_text())
    change(data)
    path = card(run).with_name("changed.json")
    path.write_text(json.dumps(data))
    return path


def test_a_result_is_drawn_again_bit_for_bit(run: Path) -> None:
    """Its weights were removed after the evaluation: they come from the run that has the result."""
    found = verify(card(run))
    assert found.same and found.sentence == "the same, bit for bit: 8 of 8 images"
    assert [image.number for image in found.images] == [0, 2, 5, 7, 10, 12, 15, 17]
    assert verify(card(run).parent).same
    proof = Results.read(card(run)).proof
    assert len({image.pixels for image in proof}) == 8 and len({image.noise for image in proof}) == 8


def test_another_result_is_not_the_same(run: Path) -> None:
    def other_seed(data: dict[str, Any]) -> None:
        data["samples"]["seed"] = 1

    found = verify(changed(run, other_seed))
    assert not found.same and found.sentence.startswith("not the same: of 8 images, these differ: 0, 2, 5")
    assert not any(image.noise or image.bits for image in found.images)

    def other_label(data: dict[str, Any]) -> None:
        data["proof"][3]["label"] += 1

    found = verify(changed(run, other_label))
    assert not found.same and [image.label for image in found.images].count(False) == 1
    assert found.sentence.endswith("these differ: 7")

    def other_sampler(data: dict[str, Any]) -> None:
        data["samples"]["sampler"]["num_steps"] = 1

    found = verify(changed(run, other_sampler))
    assert all(image.noise and image.label and not image.bits for image in found.images)


def test_other_arithmetic_is_the_same_within_the_tolerance(run: Path) -> None:
    """bf16 in place of float32, and of float32 in another machine's words."""

    def as_on_other_hardware(data: dict[str, Any]) -> None:
        data["samples"]["precision"] = "fp32" if data["samples"]["precision"] == "bf16" else "bf16"
        data["run"]["made_on"] = ["NVIDIA H200"]

    found = verify(changed(run, as_on_other_hardware))
    assert found.same and not all(image.bits for image in found.images)
    assert "the same within the tolerance: 8 of 8" in found.sentence and "made on NVIDIA H200" in found.sentence
    assert max(image.distance for image in found.images) < TOLERANCE / 2


def test_refusals_say_what_to_do(run: Path) -> None:
    weights = export.export(run, run / "params.safetensors", WeightsChoice(weights="params"))
    with pytest.raises(ValueError, match=r"--checkpoint: .*params\.safetensors has SHA-256 .*; give that file"):
        verify(card(run), checkpoint=weights)
    with pytest.raises(ValueError, match="drawn without one; leave it out"):
        verify(card(run), guide=weights)
    with pytest.raises(ValueError, match="labels of the result are balanced; leave it out"):
        verify(card(run), labels=weights)

    def without_proof(data: dict[str, Any]) -> None:
        del data["proof"]

    with pytest.raises(ValueError, match="it has no proof, as results of earlier releases"):
        verify(changed(run, without_proof))

    def with_a_file(data: dict[str, Any]) -> None:
        data["samples"]["labels"] = {"kind": "file", "sha256": "0"}

    with pytest.raises(ValueError, match="--labels: missing; the result was drawn with a file of labels"):
        verify(changed(run, with_a_file))

    def without_settings(data: dict[str, Any]) -> None:
        del data["samples"]["batch"], data["samples"]["attention"]

    with pytest.raises(ValueError, match=r"the result lacks samples\.batch, samples\.attention; generate and score"):
        verify(changed(run, without_settings))

    def cut_off(data: dict[str, Any]) -> None:
        data["proof"][1]["small"] = data["proof"][1]["small"][:-4]

    with pytest.raises(ValueError, match=r"proof\.1\.small: '.*; allowed: 768 bytes in base64"):
        verify(changed(run, cut_off))

    def of_other_letters(data: dict[str, Any]) -> None:
        data["proof"][1]["small"] = "ä" + data["proof"][1]["small"][1:]

    with pytest.raises(ValueError, match=r"proof\.1\.small: 'ä.*; allowed: 768 bytes in base64"):
        verify(changed(run, of_other_letters))
    elsewhere = run.parent / "elsewhere.json"
    elsewhere.write_text(card(run).read_text())
    with pytest.raises(ValueError, match="--checkpoint: .* give the file with SHA-256"):
        verify(elsewhere)


def test_the_proven_images_are_of_the_first_and_the_last_batch() -> None:
    assert proven_rows(range(100), 1000) == [0, 25, 50, 75]
    assert proven_rows(range(100, 200), 1000) == []
    assert proven_rows(range(900, 1000), 1000) == [900, 925, 950, 975]
    assert proven_rows(range(2), 2) == [0, 1]
    assert proof_tensors([], torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 8, 8, dtype=torch.uint8)) == {}


def test_distances_are_of_block_means() -> None:
    image = (torch.arange(3 * 32 * 32) % 251).to(torch.uint8).view(3, 32, 32)
    means = image.view(3, 16, 2, 16, 2).float().mean((2, 4)).round()
    assert torch.equal(small_copy(image).float(), means)
    kept = proof_tensors([4], torch.zeros(1, 1, 2, 2), image[None])
    small = base64.b64encode(kept["proof_small"][0].numpy().tobytes()).decode()
    proof = ImageProof(number=4, label=0, noise="", pixels=sha256(image), small=small)
    assert proof.distance(image) == 0.0
    brighter = (image.int() + 4).clamp(max=255).to(torch.uint8)
    assert proof.distance(brighter) == pytest.approx(4.0, abs=0.1) and sha256(brighter) != proof.pixels
    half = 4 * torch.tensor([-1, 1]).repeat_interleave(16)  # darker on the left by as much as brighter on the right
    assert proof.distance((image.int() + half).clamp(0, 255).to(torch.uint8)) == pytest.approx(4.0, abs=0.1)
