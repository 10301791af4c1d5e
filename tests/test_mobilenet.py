"""MobileNet: against a restatement in numpy, and what it sees in real pictures."""

import io
import zipfile

import jax
import numpy as np
import PIL.Image
import pytest

from models import mobilenet
from tests.conftest import thorough
from utils.fid import FeatureStats, frechet_distance


def random_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors in Keras' names; statistics far from 0 and 1, so that no part of a norm hides."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in mobilenet.shapes().items():
        values = random.standard_normal(shape)
        if name.endswith("kernel"):
            inputs = 9 if name.endswith("depthwise_kernel") else np.prod(shape[:-1])
            values *= np.sqrt(2 / inputs)
        elif name.endswith(("gamma", "variance")):
            values = np.exp(0.3 * values)
        tensors[name] = values.astype(np.float32)
    return tensors


def run(params, x) -> dict[str, np.ndarray]:
    apply = jax.jit(lambda params, x: mobilenet.MobileNet().apply({"params": params}, x))
    return jax.device_get(apply(params, x))


def convolved(x: np.ndarray, kernel: np.ndarray, stride: int, depthwise: bool) -> np.ndarray:
    """A convolution with TensorFlow's "same" padding, from its definition."""
    size = kernel.shape[0]
    wanted = -(-x.shape[1] // stride)
    total = max(0, (wanted - 1) * stride + size - x.shape[1])
    before, after = total // 2, total - total // 2
    x = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    windows = windows[:, ::stride, ::stride]  # n, place, place, channel, row, column
    if depthwise:
        return np.einsum("nxycij,ijc->nxyc", windows, kernel[..., 0])
    return np.tensordot(windows, kernel, axes=([4, 5, 3], [0, 1, 2]))


def restated(tensors: dict[str, np.ndarray], x: np.ndarray) -> dict[str, np.ndarray]:
    """Keras' network in float64, its batch norms as they are written."""
    tensors = {name: value.astype(np.float64) for name, value in tensors.items()}

    def layer(x, name, stride=1, depthwise=False):
        part = "depthwise_kernel" if depthwise else "kernel"
        h = convolved(x, tensors[f"{name}/{part}"], stride, depthwise)
        gamma, beta, mean, variance = (
            tensors[f"{name}_bn/{part}"]
            for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return np.clip(gamma * (h - mean) / np.sqrt(variance + 0.001) + beta, 0, 6)

    x = layer(x, "conv1", stride=2)
    for i, stride in enumerate([1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1], 1):
        x = layer(x, f"conv_dw_{i}", stride, depthwise=True)
        x = layer(x, f"conv_pw_{i}")
    pool = x.mean((1, 2))
    logits = pool @ tensors["conv_preds/kernel"][0, 0] + tensors["conv_preds/bias"]
    return {"pool": pool, "logits": logits}


def test_equals_a_restatement_in_numpy() -> None:
    tensors = random_tensors()
    x = np.random.default_rng(1).uniform(-1, 1, (1, 224, 224, 3)).astype(np.float32)
    found, expected = run(mobilenet.params_of(tensors), x), restated(tensors, x)
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        assert value.std() > 0.05  # not all clipped away
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4 * abs(value).max())


def test_params_are_what_the_network_initialises() -> None:
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    wanted = jax.eval_shape(mobilenet.MobileNet().init, jax.random.key(0), x)["params"]
    found = mobilenet.params_of(random_tensors())
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), wanted
    )


def test_range_and_size_of_the_input() -> None:
    black_and_white = np.stack([np.zeros((300, 200, 3)), np.full((300, 200, 3), 255)])
    x = np.asarray(mobilenet.PROTOCOLS["clean"](black_and_white.astype(np.uint8)))
    assert x.shape == (2, 224, 224, 3)
    np.testing.assert_allclose(x[0], -1, atol=1e-5)
    np.testing.assert_allclose(x[1], 1, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv_pw_3_bn/beta": None, "conv1_bn/beta": None}, r"2 of \d+ tensors missing .*conv1_b"),
        ({"other/kernel": np.zeros(3)}, r"1 unknown \(first other/kernel\)"),
        (
            {"conv1/kernel": np.zeros((3, 3, 3, 32))},
            r"1 of \d+ tensors of another shape \(first conv1/kernel \(3, 3, 3, 32\) instead of",
        ),
    ],
)
def test_wrong_tensors_are_named(change, words) -> None:
    tensors = random_tensors() | change
    tensors = {name: value for name, value in tensors.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        mobilenet.params_of(tensors)


# Real pictures and the real weights


@pytest.fixture
def extract(shared):
    """uint8 (n, 256, 256, 3), a multiple of 32 of them → outputs, with the real weights."""
    with np.load(shared / "weights" / "mobilenet_v1_075_imagenet_fp32.npz") as file:
        params = mobilenet.params_of(dict(file))

    @jax.jit
    def apply(params, pictures):
        return mobilenet.MobileNet().apply({"params": params}, mobilenet.clean(pictures))

    def extract(pictures):
        parts = [
            jax.device_get(apply(params, part)) for part in np.split(pictures, len(pictures) // 32)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return extract


def read(path, count: int, every: int = 1) -> tuple[list[str], np.ndarray]:
    """Names and pictures of a zip, sorted by name."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        names = names[::every][:count]
        files = [PIL.Image.open(io.BytesIO(archive.read(name))) for name in names]
        return names, np.stack([np.asarray(file.convert("RGB")) for file in files])


def test_real_weights_see_what_is_in_real_pictures(shared, extract) -> None:
    """Top-1 85.2 %, top-5 96.7 % on another 1000 pictures; here within what 192 leave open."""
    names, pictures = read(shared / "data" / "imagenet_sample_200_256.zip", 192)
    classes = np.array([int(name.split("/")[0]) for name in names])
    best = np.argsort(-extract(pictures)["logits"], axis=1)
    assert (best[:, 0] == classes).mean() > 0.8
    assert (best[:, :5] == classes[:, None]).any(axis=1).mean() > 0.94


@thorough
def test_distances_order_faces_noisy_faces_and_other_pictures(shared, extract) -> None:
    _, faces = read(shared / "data" / "omi_faces_400_256.zip", 256)
    _, others = read(shared / "data" / "imagenet_sample_200_256.zip", 128)
    noise = 25 * np.random.default_rng(0).standard_normal(faces[:128].shape)
    noisy = np.rint(faces[:128] + noise).clip(0, 255).astype(np.uint8)
    sets = (faces[:128], faces[128:], noisy, others)
    first, *rest = (FeatureStats.of(extract(pictures)["pool"]) for pictures in sets)
    same, noised, other = (frechet_distance(first, stats) for stats in rest)
    # Measured: 71, 132 and 641. They fall with the number of pictures: halves of 1004 faces are 29
    # apart, and 87 lie between those faces and the same with noise.
    assert 1.2 * same < noised < 0.5 * other
