"""Image features: what each extractor is, and how it is named and refused."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qlip_inception.network import FidInception
from qlip_plugins.adapter import IMAGE_FEATURES
from qlip_plugins.errors import AdapterNotFoundError, ArtefactError, RecipeError
from qlip_plugins.image_features import ImageFeatures, open_features


def pictures(count: int = 3, side: int = 64) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names and shapes of the real file, of a size that keeps the signal alive."""
    torch.manual_seed(0)
    network = FidInception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    state = network.state_dict()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({name: tensor for name, tensor in state.items() if "num_batches" not in name}, path)
    return path


@pytest.mark.parametrize(
    ("name", "pooled", "spatial"),
    [("demo", 288, 448), ("efficientnet-lite0", 1280, 1372), ("inception", 2048, 2023)],
)
def test_every_extractor_describes_each_picture_alone(
    name: str, pooled: int, spatial: int, inception_weights: Path
) -> None:
    features = open_features(f"{name}={inception_weights}" if name == "inception" else name, "cpu")
    assert isinstance(features, ImageFeatures)
    assert re.fullmatch("[0-9a-f]{64}", features.digest)
    for call, length in ((features, pooled), (features.spatial, spatial)):
        found = call(pictures())
        assert found.dtype == torch.float32
        assert found.shape == (3, length)
        apart = (found[0] - found[1]).norm()
        assert (found[1] - call(pictures()[1:2])[0]).norm() < 1e-3 * apart


def test_extractors_have_names_of_their_own(inception_weights: Path) -> None:
    named = [entry.name for entry in entry_points(group=IMAGE_FEATURES)]
    opened = [open_features(n if n != "inception" else f"{n}={inception_weights}", "cpu") for n in named]
    assert len({features.name for features in opened}) == len({f.digest for f in opened}) == len(named)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("efficientnet", AdapterNotFoundError, "did you mean 'efficientnet-lite0'"),
        ("demo=weights.pth", RecipeError, "found the path weights.pth, expected none"),
        ("inception", RecipeError, "name the weights, inception=PATH"),
        ("inception=", RecipeError, "a path is needed after the equals sign"),
        ("inception=none.pth", ArtefactError, "no such file of weights"),
    ],
)
def test_what_cannot_be_opened_is_refused(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_features(text, "cpu")


def test_other_weights_are_refused(tmp_path: Path, inception_weights: Path) -> None:
    with pytest.raises(ArtefactError, match="not the weights of a EfficientNet"):
        open_features(f"efficientnet-lite0={inception_weights}", "cpu")
    path = tmp_path / "weights.pth"
    path.write_bytes(inception_weights.read_bytes()[:100_000])
    with pytest.raises(ArtefactError, match="damaged, or no file of weights"):
        open_features(f"inception={path}", "cpu")
    state = torch.load(inception_weights, weights_only=True)
    torch.save(state | {"fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(ArtefactError, match=r"'fc.weight': found \(1000, 2048\), expected \(1008, 2048\)"):
        open_features(f"inception={path}", "cpu")
    state["fc.bias"][7] = torch.nan
    torch.save(state, path)
    with pytest.raises(ArtefactError, match="NaN or infinite"):
        open_features(f"inception={path}", "cpu")


SHAPES = {  # name: (outputs, inputs, kernel), as published lists of Inception v3's parameters have them
    "Conv2d_1a_3x3": (32, 3, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1),
    "Conv2d_4a_3x3": (192, 80, 3, 3),
    "Mixed_5b.branch1x1": (64, 192, 1, 1),
    "Mixed_5b.branch5x5_1": (48, 192, 1, 1),
    "Mixed_5b.branch5x5_2": (64, 48, 5, 5),
    "Mixed_5c.branch3x3dbl_1": (64, 256, 1, 1),
    "Mixed_5c.branch3x3dbl_2": (96, 64, 3, 3),
    "Mixed_5d.branch3x3dbl_3": (96, 96, 3, 3),
    "Mixed_5d.branch_pool": (64, 288, 1, 1),
    "Mixed_6a.branch3x3": (384, 288, 3, 3),
    "Mixed_6a.branch3x3dbl_3": (96, 96, 3, 3),
    "Mixed_6b.branch7x7_2": (128, 128, 1, 7),
    "Mixed_6c.branch7x7_3": (192, 160, 7, 1),
    "Mixed_6c.branch7x7dbl_1": (160, 768, 1, 1),
    "Mixed_6d.branch7x7dbl_2": (160, 160, 7, 1),
    "Mixed_6d.branch7x7dbl_3": (160, 160, 1, 7),
    "Mixed_6e.branch7x7dbl_4": (192, 192, 7, 1),
    "Mixed_6e.branch7x7dbl_5": (192, 192, 1, 7),
    "Mixed_7a.branch3x3_2": (320, 192, 3, 3),
    "Mixed_7a.branch7x7x3_2": (192, 192, 1, 7),
    "Mixed_7a.branch7x7x3_3": (192, 192, 7, 1),
    "Mixed_7a.branch7x7x3_4": (192, 192, 3, 3),
    "Mixed_7b.branch3x3_2a": (384, 384, 1, 3),
    "Mixed_7b.branch3x3_2b": (384, 384, 3, 1),
    "Mixed_7c.branch3x3dbl_1": (448, 2048, 1, 1),
    "Mixed_7c.branch3x3dbl_2": (384, 448, 3, 3),
    "Mixed_7c.branch3x3dbl_3a": (384, 384, 1, 3),
    "Mixed_7c.branch_pool": (192, 2048, 1, 1),
}


def test_inception_has_the_published_parameters() -> None:
    with torch.device("meta"):
        state = FidInception().state_dict()
    for name, shape in SHAPES.items():
        assert state[f"{name}.conv.weight"].shape == shape, name
    # 94 convolutions, each with four tensors of its normalisation, and the classifier's two.
    assert sum("num_batches" not in name for name in state) == 94 * 5 + 2
    assert sum(tensor.numel() for name, tensor in state.items() if name.endswith("conv.weight")) == 21_751_136


def test_inception_s_pools_are_those_of_fid() -> None:
    torch.manual_seed(0)
    network = FidInception().eval()
    x = torch.randn(1, 2048, 8, 8)

    def rectified(block: torch.nn.Module, pooled: Tensor) -> Tensor:
        return F.relu(block.bn(block.conv(pooled)))  # type: ignore[operator]

    for block, width, average in ((network.Mixed_7b, 1280, True), (network.Mixed_7c, 2048, False)):
        inputs = x[:, :width]
        windows = F.unfold(F.pad(inputs, (1, 1, 1, 1), value=torch.nan), 3).view(1, width, 9, 8, 8)
        expected = windows.nanmean(2) if average else windows.nan_to_num(-torch.inf).amax(2)
        assert block.branch_pool is not None
        with torch.no_grad():
            found, wanted = block(inputs)[:, -192:], rectified(block.branch_pool, expected)
        assert torch.allclose(found, wanted, atol=1e-5)
        assert not torch.allclose(wanted, rectified(block.branch_pool, F.avg_pool2d(inputs, 3, 1, 1)))
