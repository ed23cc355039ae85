"""Feature extractors: the tap of sFID, exact arithmetic, weights that are checked, other registered networks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch_fidelity
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from eval.features.config import (
    INCEPTION_SHA256,
    INCEPTION_URL,
    ConvNetConfig,
    DINOv2ExtractorConfig,
    InceptionConfig,
    RegisteredConfig,
)
from eval.features.convnet import register
from eval.features.downloads import fetch
from eval.features.extractor import LazyExtractor
from eval.features.inception import InceptionFeatures
from eval.features.make import build_extractor, fingerprint, make_extractor
from eval.images.outputs import to_image
from eval.images.sources import NpzSource
from eval.metrics.config import MetricsConfig
from eval.metrics.frechet import frechet_distance
from eval.metrics.moments import moments
from eval.recipe import EvalRecipe
from eval.score import score
from sfd_scale.runtime.matmul import allow_tf32, no_tf32, strict_float32
from sfd_scale.toy.convnet import SmallConvNet, SmallConvNetConfig

CPU = torch.device("cpu")


def images(count: int, size: int = 64, seed: int = 0) -> Tensor:
    """Smooth random images."""
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(noise, size=size, mode="bicubic").clamp(0, 1)
    return (255 * large).to(torch.uint8)


class Unloaded(FeatureExtractorInceptionV3):  # type: ignore[misc]
    """The network without weights: the constructor takes whatever state it is given."""

    def load_state_dict(self, state: object, *args: object, **kwargs: object) -> None:  # type: ignore[override]
        if state:
            super().load_state_dict(state, *args, **kwargs)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that Inception's features survive: He-normal convolutions, norms fitted to images."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "nothing.pth")
    net = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(folder / "nothing.pth"))
    draw = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, generator=draw)
        elif isinstance(module, torch.nn.Linear):
            module.weight.data.normal_(0, 0.05, generator=draw)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(images(4))
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    path = folder / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def inception(weights: Path) -> InceptionFeatures:
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    built = build_extractor(InceptionConfig(weights=weights, sha256=sha256), CPU)
    assert isinstance(built, InceptionFeatures)
    return built


def test_inception_taps(inception: InceptionFeatures, weights: Path) -> None:
    pixels = images(2)
    found = inception(pixels)
    net = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    maps: list[Tensor] = []
    net.Mixed_6d.register_forward_hook(lambda module, args, output: maps.append(output))
    with torch.no_grad():
        pool, logits = net(pixels)
    assert torch.equal(found.pool, pool) and found.pool.shape == (2, 2048)
    assert found.logits is not None and torch.equal(found.logits, logits) and logits.shape == (2, 1008)
    # The tap, after the ReLU, is the first of Mixed_6d's joined branches; rows, columns, channels.
    assert found.spatial is not None and found.spatial.shape == (2, 2023) and found.spatial.min() == 0
    assert torch.equal(found.spatial, maps[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1))
    h, w, c = 5, 11, 3
    assert found.spatial[1, (h * 17 + w) * 7 + c] == maps[0][1, c, h, w] != maps[0][1, c, w, h]
    assert found.pool.std(0).mean() > 1e-2  # the weights do something


def test_known_bad_variants_move_the_features(inception: InceptionFeatures) -> None:
    """Autocast, half-pixel resize and a bias are what wrong pipelines have; each is seen, and ours has none of them."""
    pixels = images(2)
    good = inception(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = inception(pixels)
        with torch.no_grad():
            low = inception.network(pixels)[0]
    assert torch.equal(inside.pool, good.pool)
    assert (low.float() - good.pool).norm() > 1e-3 * good.pool.norm()
    small = pixels.float()
    ours = interpolate_bilinear_2d_like_tensorflow1x(small, size=(299, 299), align_corners=False)
    half = torch.nn.functional.interpolate(small, size=(299, 299), mode="bilinear", align_corners=False)
    assert (ours - half).abs().max() > 1
    moved = inception(half.round().clamp(0, 255).to(torch.uint8))
    assert (moved.pool - good.pool).norm() > 1e-2 * good.pool.norm()
    # And the score: none against itself, and more than the rounding of any exact variant.
    base = moments(good.pool[:, :64])
    assert abs(frechet_distance(base, moments(inside.pool[:, :64]))) < 1e-9
    for wrong in (low, moved.pool):
        assert frechet_distance(base, moments(wrong[:, :64])) > 1e-4
    assert good.logits is not None
    assert torch.allclose(good.logits, good.pool @ inception.network.fc.weight.T, atol=1e-4)
    assert not torch.allclose(good.logits, inception.network.fc(good.pool), atol=1e-3)


@pytest.mark.full
def test_inception_scores_from_files(weights: Path, tmp_path: Path) -> None:
    """The whole way with the real network: two .npz files, 2,048 and 2,023 features, far fewer images."""
    sets = [images(8, size=96, seed=seed) for seed in (1, 2)]
    for number, pixels in enumerate(sets):
        np.savez(tmp_path / f"{number}.npz", pixels.permute(0, 2, 3, 1).numpy())
    extractor = InceptionConfig(weights=weights, sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    recipe = EvalRecipe(
        extractor=extractor, extractor_batch=4, reference=NpzSource(path=tmp_path / "1.npz"), cache=tmp_path / "cache",
        metrics=MetricsConfig(kid_subsets=2),
    )  # fmt: skip
    results = score(recipe, tmp_path / "0.npz", tmp_path / "results.json")
    assert [key for key, value in results.scores.by_key().items() if value is None] == ["fdr"]
    assert any("8 samples for 2048 features" in warning for warning in results.warnings)
    built = build_extractor(extractor, CPU)
    ours, theirs = (built(pixels) for pixels in sets)
    # Of rank 7 each: the distance of their Gram matrices is that of the covariances.
    both = [found.pool.double() - found.pool.double().mean(0) for found in (ours, theirs)]
    trace = torch.linalg.matrix_norm(both[0] @ both[1].T, "nuc") / 7
    shift = (ours.pool.double().mean(0) - theirs.pool.double().mean(0)).square().sum()
    expected = shift + sum(part.square().sum() for part in both) / 7 - 2 * trace
    assert results.scores.fid == pytest.approx(expected.item(), rel=1e-6)


def test_resize_is_tensorflow_1() -> None:
    """No half-pixel centres: output i samples input i·in/out, in closed form on a ramp."""
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    found = interpolate_bilinear_2d_like_tensorflow1x(ramp, size=(299, 299), align_corners=False)
    expected = (torch.arange(299) * (64 / 299)).clamp(max=63)
    assert torch.allclose(found[0, 0, 0], expected, atol=1e-4)


def test_resize_is_that_of_the_tensorflow_kernel_to_the_bit() -> None:
    """ResizeBilinear of TensorFlow 1 as its CPU kernel adds it up in float32: along rows, then along columns."""
    pixels = torch.randint(256, (1, 3, 64, 80), generator=torch.Generator().manual_seed(0)).numpy().astype(np.float32)

    def source(size: int) -> tuple[Any, Any, Any]:
        at = np.arange(299, dtype=np.float32) * np.float32(size / 299)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, size - 1), at - np.floor(at)

    (top, bottom, v), (left, right, u) = source(64), source(80)
    upper = pixels[:, :, top][..., left] + (pixels[:, :, top][..., right] - pixels[:, :, top][..., left]) * u
    lower = pixels[:, :, bottom][..., left] + (pixels[:, :, bottom][..., right] - pixels[:, :, bottom][..., left]) * u
    expected = upper + (lower - upper) * v[:, None]
    found = interpolate_bilinear_2d_like_tensorflow1x(torch.from_numpy(pixels), size=(299, 299), align_corners=False)
    assert expected.dtype == np.float32 and np.array_equal(found.numpy(), expected)


def test_full_precision_sets_and_restores() -> None:
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    backends[1].fp32_precision = "tf32"
    with torch.autocast("cpu", dtype=torch.bfloat16), strict_float32(CPU):
        assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.backends.cudnn.deterministic
    assert backends[1].fp32_precision == "tf32"
    for backend, value in zip(backends, before, strict=True):
        backend.fp32_precision = value


@pytest.mark.parametrize("tf32", [False, True])
def test_other_code_can_read_and_write_the_old_tf32_flags_inside(tf32: bool) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision
    with allow_tf32() if tf32 else no_tf32():
        assert cudnn.allow_tf32 is tf32 and matmul.allow_tf32 is tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        with cudnn.flags(enabled=True, allow_tf32=not tf32):
            assert cudnn.allow_tf32 is not tf32
        matmul.allow_tf32 = not tf32
        assert matmul.fp32_precision == ("ieee" if tf32 else "tf32")
    assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision) == before
    assert cudnn.allow_tf32 is (before[0] == "tf32") and matmul.allow_tf32 is (before[2] == "tf32")


def test_images_have_to_be_uint8(inception: InceptionFeatures) -> None:
    with pytest.raises(ValueError, match="torch.float32"):
        inception(images(1).float())
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\)"):
        inception(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


# ------------------------------------------------------------------------------------------------- weights


def fetched(config: InceptionConfig) -> Path:
    return fetch(config.weights, config.url, config.sha256)


def test_weights_are_checked(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"expected {INCEPTION_SHA256}"):
        fetched(InceptionConfig(weights=weights))
    with pytest.raises(ValueError, match="does not exist; allowed: the path of a download of https://"):
        fetched(InceptionConfig(weights=tmp_path / "none.pth"))


def test_the_published_checksum_is_that_of_the_url() -> None:
    assert INCEPTION_URL.endswith(f"-{INCEPTION_SHA256[:8]}.pth")


def test_weights_are_downloaded_and_a_wrong_file_is_not_kept(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    sha256, url = hashlib.sha256(weights.read_bytes()).hexdigest(), weights.as_uri()
    with pytest.raises(ValueError, match="does not exist"):
        fetched(InceptionConfig(url=url, sha256="0" * 64))
    assert not list((tmp_path / "checkpoints").iterdir())
    path = fetched(InceptionConfig(url=url, sha256=sha256))
    assert path.read_bytes() == weights.read_bytes()


def test_code_in_weights_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    torch.save({"x": Path("/")}, path)  # any class that is no tensor stands for one that runs code
    config = InceptionConfig(weights=path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    registered = RegisteredConfig(name="vgg16", pooled="fc2", weights=path)
    for bad in (config, registered, DINOv2ExtractorConfig(weights=path)):
        with pytest.raises(ValueError, match="not loaded .*[Ww]eights.only"):
            build_extractor(bad, CPU)


def test_an_extractor_is_built_once_and_late() -> None:
    built = []

    class Named:
        fingerprint = "x"

    lazy = LazyExtractor("x", lambda: built.append(1) or Named())  # type: ignore[func-returns-value, return-value]
    assert not built and lazy.get() is lazy.get() and len(built) == 1
    assert make_extractor(InceptionConfig(), CPU).fingerprint == f"inception-v3-compat:{INCEPTION_SHA256}"


# ------------------------------------------------------------------------------------------------- others


@pytest.fixture
def convnet(tmp_path: Path) -> ConvNetConfig:
    net = SmallConvNet(SmallConvNetConfig(widths=(16, 32, 48), num_classes=10, image_size=32))
    net.init_weights(0)
    save_file(net.state_dict(), tmp_path / "classifier.safetensors")
    return ConvNetConfig(weights=tmp_path / "classifier.safetensors")


def test_convnet(convnet: ConvNetConfig) -> None:
    extractor = build_extractor(convnet, CPU)
    pixels = images(3, size=32)
    found = extractor(pixels)
    net = SmallConvNet(SmallConvNetConfig(widths=(16, 32, 48), num_classes=10, image_size=32))
    net.init_weights(0)
    with torch.no_grad():
        direct = net(pixels)
    assert torch.equal(found.pool, direct.pooled) and found.logits is not None
    assert torch.equal(found.logits, direct.logits)
    assert found.spatial is not None and found.spatial.shape == (3, 4 * 4 * 7)
    assert found.spatial[2, (2 * 4 + 1) * 7 + 4] == direct.grid[2, 4, 2, 1]
    assert extractor.fingerprint == fingerprint(convnet) and "sfd-convnet" in extractor.fingerprint
    with pytest.raises(ValueError, match="trained on images of 32 pixels"):
        extractor(images(1, size=64))


def test_convnet_serves_torch_fidelity_itself(convnet: ConvNetConfig, tmp_path: Path) -> None:
    """Registered for real: torch-fidelity's own program takes it, and gives our FID."""
    sets = []
    for number in range(2):
        pixels = images(80, size=32, seed=number) // (number + 1)
        (tmp_path / str(number)).mkdir()
        for index, image in enumerate(pixels):
            to_image(image).save(tmp_path / f"{number}/{index:03d}.png")
        sets.append(moments(build_extractor(convnet, CPU)(pixels).pool))
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "0"), input2=str(tmp_path / "1"), fid=True, cuda=False, verbose=False, cache=False,
        feature_extractor=register(), feature_extractor_weights_path=str(convnet.weights),
    )  # fmt: skip
    assert frechet_distance(*sets) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


def test_registered_extractors_by_name(weights: Path) -> None:
    config = RegisteredConfig(name="inception-v3-compat", pooled="64", logits="logits", weights=weights)
    found = build_extractor(config, CPU)(images(1))
    assert found.pool.shape == (1, 64) and found.logits is not None and found.spatial is None
    with pytest.raises(ValueError, match="no layer 65; allowed: 64, 192"):
        build_extractor(RegisteredConfig(name="inception-v3-compat", pooled="65", weights=weights), CPU)
    with pytest.raises(ValueError, match="allowed: .*dinov2"):
        build_extractor(RegisteredConfig(name="dino", pooled="x"), CPU)


@pytest.mark.parametrize("name", ["vgg16", "clip-vit-b-32", "dinov2-vit-b-14", "inception-v3-compat"])
def test_what_would_run_a_download_is_refused(name: str) -> None:
    layer = {"vgg16": "fc2", "inception-v3-compat": "2048"}.get(name, name.split("-")[0])
    with pytest.raises(ValueError, match=f"{name} runs code from what it downloads; allowed: trust_remote_code=true"):
        build_extractor(RegisteredConfig(name=name, pooled=layer), CPU)


def test_an_extractor_of_the_users_own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of torch-fidelity's base, in a module that registers it."""
    (tmp_path / "my_features.py").write_text("""
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import register_feature_extractor


class MeanColour(FeatureExtractorBase):
    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
        super().__init__(name, features_list)

    def forward(self, images):
        return tuple(images.float().mean((2, 3)) for _ in self.features_list)

    @staticmethod
    def get_provided_features_list():
        return ("colour",)


register_feature_extractor("mean-colour", MeanColour)
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = RegisteredConfig(module="my_features", name="mean-colour", pooled="colour")
    pixels = images(2)
    assert torch.allclose(build_extractor(config, CPU)(pixels).pool, pixels.float().mean((2, 3)))
    assert fingerprint(config) == "my_features:mean-colour:colour:None:None:its own"
    with pytest.raises(ValueError, match="module: no_such cannot be imported"):
        build_extractor(RegisteredConfig(module="no_such", name="x", pooled="x"), CPU)


def off(a: Tensor, b: Tensor) -> float:
    """How far apart, as a share."""
    return ((a - b).norm() / b.norm()).item()


def test_dinov2_by_the_authors_file(tmp_path: Path) -> None:
    """Random weights under the authors' names, with positions of 37x37 patches."""
    draw = torch.Generator().manual_seed(0)
    net = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=518, num_classes=0)
    state = {
        name: torch.ones_like(value) if value.ndim == 1 else 0.08 * torch.randn(value.shape, generator=draw)
        for name, value in net.state_dict().items()
    }
    state["pos_embed"] *= 12
    torch.save({**state, "mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2_vits14_pretrain.pth")
    config = DINOv2ExtractorConfig(model="vit_small_patch14_dinov2", weights=tmp_path / "dinov2_vits14_pretrain.pth")
    extractor = build_extractor(config, CPU)
    pixels = torch.randint(256, (2, 3, 256, 256), generator=draw, dtype=torch.uint8)
    found = extractor(pixels)
    assert found.pool.shape == (2, 384) and found.spatial is None and found.logits is None

    # The authors' rule for positions and EDM2's for pixels, spelled out; the two wrong rules move the features.
    grid = state["pos_embed"][:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")
    right = torch.cat([state["pos_embed"][:, :1], resized.permute(0, 2, 3, 1).reshape(1, 256, 384)], 1)
    plain = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=224, num_classes=0).eval()

    def token(positions: Tensor, antialias: bool) -> Tensor:
        plain.load_state_dict({**state, "pos_embed": positions})
        small = torch.nn.functional.interpolate(pixels.float(), size=(224, 224), mode="bicubic", antialias=antialias)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            return plain.forward_features((small / 255 - mean[:, None, None]) / std[:, None, None])[:, 0]

    assert off(found.pool, token(right, antialias=True)) < 1e-5
    assert off(found.pool, token(right, antialias=False)) > 1e-2
    smooth = torch.nn.functional.interpolate(grid, size=(16, 16), mode="bicubic", antialias=True)
    other = torch.cat([state["pos_embed"][:, :1], smooth.permute(0, 2, 3, 1).reshape(1, 256, 384)], 1)
    assert off(found.pool, token(other, antialias=True)) > 1e-2
    with pytest.raises(ValueError, match="not those of vit_base_patch14_dinov2"):
        build_extractor(DINOv2ExtractorConfig(model="vit_base_patch14_dinov2", weights=config.weights), CPU)
    with pytest.raises(ValueError, match="^weights: null"):
        DINOv2ExtractorConfig()
    with pytest.raises(ValueError, match="^sha256: null, with the url"):
        DINOv2ExtractorConfig(url="https://example.org/x.pth")
