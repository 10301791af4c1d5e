"""DINOv2: against a restatement in numpy; names, sizes and positions. torch: tests/oracles."""

import jax
import numpy as np
import pytest
import scipy.special

from models import dinov2
from tests import dinov2_names

WIDTH, DEPTH, SIDE = 128, 2, 20


def random_tensors(gated: bool = False, **changes) -> dict[str, np.ndarray]:
    """Tensors in the original's names, of a network with two heads; nothing stays 0 or 1."""
    random = np.random.default_rng(0)
    hidden = 344 if gated else 4 * WIDTH
    inner = "mlp.w12" if gated else "mlp.fc1"
    outer = "mlp.w3" if gated else "mlp.fc2"
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + SIDE**2, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 14, 14),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        for part in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"{block}.{part}"] = (WIDTH,)
        shapes |= {f"{block}.ls1.gamma": (WIDTH,), f"{block}.ls2.gamma": (WIDTH,)}
        dense = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        dense |= {inner: ((1 + gated) * hidden, WIDTH), outer: (WIDTH, hidden)}
        for part, shape in dense.items():
            shapes |= {f"{block}.{part}.weight": shape, f"{block}.{part}.bias": shape[:1]}
    tensors = {}
    for name, shape in (shapes | changes).items():
        values = random.standard_normal(shape)
        if len(shape) in (2, 4):
            values *= 2 / np.sqrt(np.prod(shape[1:]))
        elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")):
            values = 1 + 0.3 * values
        tensors[name] = values.astype(np.float32)
    return tensors


def run(tensors, x) -> np.ndarray:
    network, params = dinov2.network_of(tensors), dinov2.params_of(tensors)
    apply = jax.jit(lambda params, x: network.apply({"params": params}, x))
    return np.asarray(apply(params, x)["pool"])


def restated(tensors, x: np.ndarray) -> np.ndarray:
    """One picture (224, 224, 3) → the class token, in float64, token by token and head by head."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    def dense(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    positions = dinov2.positions(t["pos_embed"])[0]
    tokens = [t["cls_token"][0, 0] + positions[0]]
    for place in range(256):
        row, column = 14 * (place // 16), 14 * (place % 16)
        patch = x[row : row + 14, column : column + 14].transpose(2, 0, 1)
        token = np.tensordot(t["patch_embed.proj.weight"], patch, 3) + t["patch_embed.proj.bias"]
        tokens.append(token + positions[1 + place])
    x = np.stack(tokens)
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        qkv = dense(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        heads = []
        for first in range(0, WIDTH, 64):
            q, k, v = (qkv[:, part + first : part + first + 64] for part in (0, WIDTH, 2 * WIDTH))
            heads.append(scipy.special.softmax(q @ k.T / 8, axis=1) @ v)
        h = np.concatenate(heads, axis=1)
        x = x + t[f"{block}.ls1.gamma"] * dense(h, f"{block}.attn.proj")
        h = norm(x, f"{block}.norm2")
        if f"{block}.mlp.w12.weight" in t:
            gate, value = np.split(dense(h, f"{block}.mlp.w12"), 2, axis=1)
            h = dense(gate * scipy.special.expit(gate) * value, f"{block}.mlp.w3")
        else:
            h = dense(h, f"{block}.mlp.fc1")
            h = dense(h * scipy.special.ndtr(h), f"{block}.mlp.fc2")
        x = x + t[f"{block}.ls2.gamma"] * h
    return norm(x[0], "norm")


@pytest.mark.parametrize("gated", [False, True])
def test_equals_a_restatement_in_numpy_under_every_name(gated) -> None:
    tensors = random_tensors(gated)
    x = np.random.default_rng(1).standard_normal((2, 224, 224, 3), np.float32)
    expected = np.stack([restated(tensors, picture) for picture in x])
    assert expected.std(0).mean() > 0.05  # the class token has attended to the pictures
    below = {f"dinov2.{k}": v for k, v in dinov2_names.hugging_face(tensors).items()}
    below["classifier.weight"] = np.zeros((3, 3))
    for named in (tensors, dinov2_names.timm(tensors), below):
        found = run(named, x)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_half_precision_tensors_become_float32() -> None:
    tensors = {name: value.astype(np.float16) for name, value in random_tensors().items()}
    leaves = jax.tree.leaves(dinov2.params_of(tensors))
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


# Positions

# torch 2.13: interpolate(torch.cos(torch.arange(37.) ** 2 / 100).expand(1, 1, 37, 37),
# scale_factor=16.1 / 37, mode="bicubic")[0, 0, 0]
WAVE = np.cos(np.arange(37.0) ** 2 / 100)
WAVE_16 = [
    *(1.0000505, 0.9963964, 0.9614964, 0.84513, 0.574511, 0.086994, -0.4967315, -0.9415966),
    *(-0.8838124, -0.1480793, 0.7651275, 0.9116325, -0.137372, -1.0122585, -0.2462823, 0.9768113),
]


@pytest.mark.parametrize("axis", [0, 1])
def test_positions_are_interpolated_as_torch_does(axis) -> None:
    """Rows and columns are not exchanged, and the class token is left alone."""
    grid = np.broadcast_to(np.expand_dims(WAVE, 1 - axis), (37, 37)).reshape(1, -1, 1)
    token = np.full((1, 1, 1), 7.0)
    found = dinov2.positions(np.concatenate([token, grid], axis=1))
    assert found.shape == (1, 257, 1)
    assert found[0, 0, 0] == 7.0
    expected = np.broadcast_to(np.expand_dims(WAVE_16, 1 - axis), (16, 16))
    np.testing.assert_allclose(found[0, 1:, 0].reshape(16, 16), expected, rtol=0, atol=1e-6)


def test_positions_of_the_wanted_grid_are_left_alone() -> None:
    embedding = np.random.default_rng(0).standard_normal((1, 257, 5))
    np.testing.assert_array_equal(dinov2.positions(embedding), embedding)


# Sizes, protocol, and files that are something else


def test_network_has_the_sizes_of_its_tensors() -> None:
    assert dinov2.network_of(random_tensors()) == dinov2.DinoV2(128, 2, 512, gated=False)
    assert dinov2.network_of(random_tensors(gated=True)) == dinov2.DinoV2(128, 2, 344, gated=True)


@pytest.mark.parametrize("gated", [False, True])
def test_params_are_what_the_network_initialises(gated) -> None:
    tensors = random_tensors(gated)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    wanted = jax.eval_shape(dinov2.network_of(tensors).init, jax.random.key(0), x)["params"]
    found = dinov2.params_of(tensors)
    assert jax.tree.map(np.shape, found) == jax.tree.map(lambda leaf: leaf.shape, wanted)


@pytest.mark.parametrize(
    ("name", "width", "depth", "hidden", "gated", "parameters"),
    [  # as torch counts the published networks, mask token included
        ("S", 384, 12, 1536, False, 22_056_576),
        ("B", 768, 12, 3072, False, 86_580_480),
        ("L", 1024, 24, 4096, False, 304_368_640),
        ("G", 1536, 40, 4096, True, 1_136_480_768),
    ],
)
def test_sizes_of_the_published_networks(name, width, depth, hidden, gated, parameters) -> None:
    network = dinov2.DinoV2(width, depth, hidden, gated)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), x)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count + (37**2 - 16**2 + 1) * width == parameters


def test_protocol_is_pillow_then_imagenets_mean_and_deviation() -> None:
    colour = np.array([124, 116, 104], np.uint8)  # near ImageNet's mean
    pictures = np.broadcast_to(colour, (2, 60, 90, 3))
    x = np.asarray(dinov2.PROTOCOLS["clean"](pictures))
    assert x.shape == (2, 224, 224, 3)
    expected = (colour / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(x, np.broadcast_to(expected, x.shape), rtol=0, atol=1e-5)


def without(*names):
    return {name: value for name, value in random_tensors().items() if name not in names}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (random_tensors(register_tokens=(1, 4, WIDTH)), "register tokens"),
        ({"embeddings.register_tokens": np.zeros((1, 4, WIDTH))}, "register tokens"),
        ({"Conv2d_1a_3x3.conv.weight": np.zeros(3)}, "not a DINOv2: no tensor patch_embed"),
        ({}, "not a DINOv2: no tensor patch_embed"),
        (
            random_tensors(**{"patch_embed.proj.weight": (WIDTH, 3, 16, 16)}),
            r"patches of 14: patch_embed.proj.weight is \(128, 3, 16, 16\)",
        ),
        (random_tensors(pos_embed=(1, 200, WIDTH)), r"pos_embed \(1, 200, 128\) is no square"),
        (random_tensors(other=(3,)), r"1 unknown \(first other\)"),
        (
            without("blocks.1.ls1.gamma", "blocks.1.ls2.gamma"),
            r"2 of \d+ tensors missing \(first blocks.1.ls1.gamma\)",
        ),
        (
            random_tensors(**{"blocks.1.attn.qkv.weight": (WIDTH, WIDTH)}),
            r"first blocks.1.attn.qkv.weight \(128, 128\) instead of \(384, 128\)",
        ),
    ],
)
def test_other_files_are_one_clear_line(tensors, words) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        dinov2.params_of(tensors)
    assert "\n" not in str(caught.value)
