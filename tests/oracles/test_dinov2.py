"""Our DINOv2 against torch: `make oracles` runs this, plain pytest does not."""

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

from models import dinov2
from tests import dinov2_names
from tests.conftest import THOROUGH
from tests.oracles import torch_dinov2 as oracle


def ours(tensors, x) -> np.ndarray:
    network, params = dinov2.network_of(tensors), dinov2.params_of(tensors)
    apply = jax.jit(lambda params, x: network.apply({"params": params}, x)["pool"])
    return np.asarray(apply(params, x))


def inputs(count: int = 2) -> np.ndarray:
    """Noise on a colour of each picture's own."""
    random = np.random.default_rng(1)
    colours = random.standard_normal((count, 1, 1, 3), np.float32)
    return colours + random.standard_normal((count, 224, 224, 3), np.float32)


def assert_close(found, expected) -> None:
    distance = float(abs(found - expected).max() / abs(expected).max())
    print(f"{distance:.1e} of {abs(expected).max():.2f}, deviation {expected.std():.2f}")
    assert expected.std() > 0.3
    # Pictures differ in their features: the class token has attended to them.
    assert expected.std(0).mean() > 0.03
    assert distance < 1e-4


@pytest.mark.parametrize(
    ("width", "depth", "side", "gated"),
    [(384, 2, 37, False), (192, 3, 16, False), (192, 2, 20, True), (128, 1, 9, False)],
)
def test_features_equal_torch(width, depth, side, gated) -> None:
    tensors = oracle.random_tensors(width, depth, side, gated)
    x = inputs()
    expected = oracle.features(tensors, x)
    for renamed in (tensors, dinov2_names.hugging_face(tensors), dinov2_names.timm(tensors)):
        assert_close(ours(renamed, x), expected)


WHOLE = [(768, 12), (1024, 24)] if THOROUGH else [(768, 12)]


@pytest.mark.parametrize(("width", "depth"), WHOLE)
def test_whole_networks_equal_torch(width, depth) -> None:
    tensors = oracle.random_tensors(width, depth)
    x = inputs()
    assert_close(ours(tensors, x), oracle.features(tensors, x))


@pytest.mark.parametrize("side", [9, 20, 32, 37, 64])
def test_positions_equal_torch(side) -> None:
    tensor = torch.randn(1, 1 + side**2, 3, generator=torch.Generator().manual_seed(side))
    found, expected = dinov2.positions(tensor.numpy()), oracle.positions(tensor).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_transformers_agrees(tmp_path) -> None:
    """At 16 × 16 positions; elsewhere transformers interpolates without the original's offset."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        image_size=224, patch_size=14, hidden_size=192, num_hidden_layers=2, num_attention_heads=3
    )
    module = transformers.Dinov2Model(config).eval()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = inputs()
    with torch.no_grad():
        expected = module(torch.from_numpy(x).permute(0, 3, 1, 2)).pooler_output.numpy()
    module.save_pretrained(tmp_path)  # the names in files are not those in memory
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert_close(ours(tensors, x), expected)
