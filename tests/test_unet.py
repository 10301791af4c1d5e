"""The U-Net: published sizes, filters, derivatives, labels and times, dropout; and its data."""

import functools
import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.signal import convolve2d

from configs import cifar10, mnist_unet, toy
from models.unet import Block, UNet, check, doubled, halved
from pipelines import build
from pipelines.stored import read_config
from tests.conftest import thorough
from tests.test_tfds import prepare
from utils import data
from utils.cli import UserError

SIDE = 8


def small(**changes) -> UNet:
    sizes = {"hidden_size": 8, "depth": 1, "num_heads": 2, "channel_multipliers": (1, 2)}
    sizes |= {"attention_resolutions": (8,), "resample": "fir", "num_classes": 3}
    return UNet(**(sizes | changes))


def inputs(n: int = 3, shape: tuple[int, ...] = (SIDE, SIDE, 2)):
    z = jax.random.normal(jax.random.key(0), (n, *shape))
    t = jnp.linspace(0.3, 0.9, n)
    return z, t / 2, t, jnp.arange(n)


@functools.cache
def drawn(**changes) -> dict:
    """Parameters with no weight left at zero."""
    shapes = jax.eval_shape(small(**changes).init, jax.random.key(0), *inputs())
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [jnp.asarray(0.2 * rng.standard_normal(a.shape), jnp.float32) for a in leaves]
    )


@functools.cache
def applied(**changes):
    return jax.jit(functools.partial(small(**changes).apply, drawn()))


def keys(n: int = 3) -> jax.Array:
    return jax.random.split(jax.random.key(5), n)


# Sizes.


def parameters(module: UNet, shape: tuple[int, ...]) -> dict:
    return jax.eval_shape(module.init, jax.random.key(0), *inputs(1, shape))["params"]


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_parameter_count_of_the_published_network():
    """55,929,347: meanflow/models/model_configs.py of github.com/Gsunshine/py-meanflow at 1f6d72d.

    Of them 525,312 are in map_layer0 and map_layer1, its embedding of times, in whose place we have
    `models.layers.Condition`. With use_edm_aug it has 3,072 more, for its labels of augmentations.
    """
    model = cifar10.get_config("meanflow").model
    module = UNet(
        model.hidden_size,
        model.depth,
        model.num_heads,
        model.channel_multipliers,
        model.attention_resolutions,
        model.resample,
    )
    found = parameters(module, (32, 32, 3))
    assert count(found) - count(found["condition"]) == 55_929_347 - 525_312


def test_zero_output_at_the_start():
    init = jax.jit(small(channel_multipliers=(1,)).init_with_output)
    u, variables = init(jax.random.key(0), *inputs())
    assert u.shape == (3, SIDE, SIDE, 2) and u.dtype == jnp.float32 and (u == 0).all()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    last = variables["params"]["decoder_0_1"]
    assert (last["conv_1"]["kernel"] == 0).all() and (last["proj"]["kernel"] == 0).all()
    assert float(jnp.abs(last["qkv"]["kernel"]).max()) == pytest.approx(
        (0.2 * 6 / (8 + 24)) ** 0.5, rel=0.05
    )


@pytest.mark.parametrize("shape", [(8, 8, 1), (4, 12, 3), (20, 8, 4)])
@pytest.mark.parametrize("changes", [{}, {"resample": "box"}, {"channel_multipliers": (3, 1, 2)}])
def test_any_size_and_channels(shape, changes):
    module = small(**({"attention_resolutions": shape[:1], "hidden_size": 6} | changes))
    u, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), *inputs(3, shape))
    assert u.shape == (3, *shape) and u.dtype == jnp.float32


def test_attention_is_where_it_is_asked_for_and_at_the_bottom():
    sizes = {"hidden_size": 4, "depth": 2, "channel_multipliers": (1, 1, 1)}
    found = parameters(UNet(**sizes, attention_resolutions=(8,)), (16, 16, 1))
    assert {name for name, block in found.items() if "qkv" in block} == {
        "encoder_1_0", "encoder_1_1", "decoder_1_2", "middle_0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": (2,)}, ("mlp",)),
        ({"shape": (28, 28, 1), "channel_multipliers": (1, 2, 2, 2)}, ("28x28", "at most 3")),
        ({"shape": (32, 20, 1), "channel_multipliers": (1,) * 6}, ("32x20", "at most 3", "1,1,1")),
        ({"attention_resolutions": (7,)}, ("no map is 7", "16, 8, 4")),
        ({"num_heads": 3}, ("the 32 channels of the maps of 4", "num_heads=2")),
        ({"num_heads": 32, "attention_resolutions": (16,)}, ("of 16", "num_heads=16")),
        ({"channel_multipliers": (1, 0)}, ("channel_multipliers", "1,2,2")),
        ({"channel_multipliers": (1, 65)}, ("channel_multipliers", "to 64")),
        ({"channel_multipliers": ()}, ("channel_multipliers", "1,2,2")),
        ({"channel_multipliers": (1,) * 9}, ("up to 8 levels", "1,2,2")),
        ({"depth": 22}, ("22 blocks at each of 3 levels", "--model.depth=21 or less")),
        ({"attention_resolutions": ("a",)}, ("attention_resolutions=('a',)", "whole numbers")),
        ({"attention_resolutions": (8.0,)}, ("attention_resolutions=(8.0,)", "whole numbers")),
        ({"attention_resolutions": (2**70,)}, (f"no map is {2**70} high",)),
        ({"resample": "cubic"}, ("cubic", "fir")),
    ],
)
def test_what_does_not_fit_is_told_with_its_mend(changes, words):
    sizes = {"shape": (16, 16, 3), "hidden_size": 16, "num_heads": 2, "resample": "box", "depth": 2}
    sizes |= {"channel_multipliers": (1, 2, 2), "attention_resolutions": ()}
    check(**sizes)
    with pytest.raises(ValueError) as caught:
        check(**(sizes | changes))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


# What it does not know, nor does the MLP.


OTHERS = {"size": "B/2", "patch_size": 2, "unroll": 4, "attention": "cudnn"}
OTHERS |= {"attention_jvp": "fused"}
CASES = {
    "unet": OTHERS | {"mlp_ratio": 2.0},
    "mlp": OTHERS | {"num_heads": 2, "dtype": "bfloat16", "remat": "full"},
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in CASES for key in CASES[name]])
def test_what_changes_nothing_is_refused_but_of_older_runs(tmp_path, name, key):
    config = mnist_unet.get_config() if name == "unet" else toy.get_config()
    shape = (28, 28, 1) if name == "unet" else (2,)
    build.network(config, shape, 0)
    kept, value = config.to_json(), CASES[name][key]
    config.model[key] = value
    with pytest.raises(UserError) as caught:
        build.network(config, shape, 0)
    assert f"model.{key}={value} changes nothing where model.name={name}" in str(caught.value)
    (tmp_path / "config.json").write_text(config.to_json())
    assert read_config(tmp_path / "config.json").to_json() == kept


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"name": "unet", "hidden_size": 90_000, "depth": 1, "mlp_ratio": 0.01}, 5e15),
        ({"name": "unet", "hidden_size": 9_000, "depth": 8}, 1.9e11),
        ({"size": "XL/2", "hidden_size": 11_520, "velocity_head": 28}, 1e11),
        ({"size": "XL/2", "hidden_size": 14_400, "mlp": "swiglu"}, 1e11),
    ],
)
def test_networks_beyond_any_machine_are_told(changes, most):
    """Above the limit by what was not counted once: multipliers, the second head, the gates."""
    config = mnist_unet.get_config() if "name" in changes else toy.get_config()
    config.model.update({"name": "dit", "mlp_ratio": 4.0, "depth": None} | changes)
    if most == 5e15:
        config.model.channel_multipliers = (64, 64, 64)
    with pytest.raises(UserError, match="give a smaller") as caught:
        build.check_ranges(config)
    words = str(caught.value).split()
    assert most <= float(words[words.index("parameters,") - 1]) < 4 * most


# Filters.


@pytest.mark.parametrize(("name", "taps"), [("box", [1, 1]), ("fir", [1, 3, 3, 1])])
def test_filters_are_convolutions(name, taps):
    """Down: filtered, every other place kept; up: zeros between, filtered, 4 times as bright."""
    x = np.random.default_rng(0).standard_normal((2, 6, 8, 3)).astype(np.float32)
    kernel = np.outer(taps, taps) / np.sum(taps) ** 2
    begin = len(taps) // 2
    for n in range(2):
        for c in range(3):
            whole = convolve2d(x[n, :, :, c], kernel)
            down = whole[begin : begin + 6 : 2, begin : begin + 8 : 2]
            np.testing.assert_allclose(halved(x, name)[n, :, :, c], down, rtol=1e-5, atol=1e-6)
            spread = np.zeros((12, 16))
            spread[::2, ::2] = 4 * x[n, :, :, c]
            begin_up = len(taps) // 2 - 1
            up = convolve2d(spread, kernel)[begin_up : begin_up + 12, begin_up : begin_up + 16]
            np.testing.assert_allclose(doubled(x, name)[n, :, :, c], up, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "margin"), [("box", 0), ("fir", 1)])
def test_constants_stay_constant(name, margin):
    """But for the border, where the filter reaches zeros beyond it, as in the published code."""
    x = jnp.full((1, 16, 16, 1), 0.7)
    inside = slice(margin, -margin or None)
    wide = slice(2 * margin, -2 * margin or None)
    np.testing.assert_allclose(halved(x, name)[:, inside, inside], 0.7, rtol=1e-6)
    np.testing.assert_allclose(doubled(x, name)[:, inside, inside], 0.7, rtol=1e-6)
    back = halved(doubled(x, name), name)
    np.testing.assert_allclose(back[:, wide, wide], 0.7, rtol=1e-6)
    if name == "box":  # exactly, whatever the picture
        y = jax.random.normal(jax.random.key(0), (1, 8, 8, 2))
        np.testing.assert_array_equal(halved(doubled(y, name), name), y)


# What it computes.


def test_the_derivative_along_the_flow_is_that_of_finite_differences():
    z, r, t, label = inputs()
    along = jax.random.normal(jax.random.key(2), z.shape), 0.3 * jnp.ones_like(r), jnp.ones_like(t)
    network = applied()

    def at(step):
        return network(*(a + step * d for a, d in zip((z, r, t), along, strict=True)), label)

    _, du = jax.jit(lambda: jax.jvp(lambda *x: network(*x, label), (z, r, t), along))()
    step = 2e-3
    np.testing.assert_allclose(du, (at(step) - at(-step)) / (2 * step), rtol=0.01, atol=0.01)
    assert float(jnp.abs(du).max()) > 0.1


def test_the_gradient_of_the_derivative_is_that_of_finite_differences():
    """As `mean_flow.derivative=plain` has it, though there the derivative is not differentiated."""
    z, r, t, label = inputs(1)
    changes = {"channel_multipliers": (1,), "attention_resolutions": ()}  # compiles faster
    module, params = small(**changes), drawn(**changes)
    toward = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size).reshape(a.shape)), params)

    def loss(step):
        moved = jax.tree.map(lambda a, d: a + step * d, params, toward)
        along = (z, jnp.zeros_like(r), jnp.ones_like(t))
        u, du = jax.jvp(lambda *x: module.apply(moved, *x, label), (z, r, t), along)
        return jnp.sum(jnp.square(u - du))

    compiled = jax.jit(jax.value_and_grad(loss))
    step = 1e-4
    slope = (compiled(step)[0] - compiled(-step)[0]) / (2 * step)
    np.testing.assert_allclose(compiled(0.0)[1], slope, rtol=0.03)


def test_label_r_and_t_matter_and_no_label_is_one_of_its_own():
    z, r, t, label = inputs()
    network = applied()
    u = network(z, r, t, label)
    others = (
        network(z, r, t, (label + 1) % 3),
        network(z, r, t, jnp.full_like(label, 3)),
        network(z, r / 2, t, label),
        network(z, r, (1 + t) / 2, label),
    )
    for other in others:
        assert (jnp.abs(u - other).reshape(3, -1).max(1) > 1e-3).all()


def test_a_sample_does_not_depend_on_its_batch_mates():
    z, r, t, label = inputs()
    network = applied(dropout=0.5)
    u = network(z, r, t, label, keys())
    other = network(z.at[1:].set(7.0), r.at[1:].set(0.0), t, label.at[1:].set(0), keys())
    np.testing.assert_allclose(u[0], other[0], rtol=1e-5, atol=1e-6)
    assert (jnp.abs(u[1] - other[1]) > 1e-3).any()


def test_dropout_follows_the_sample_and_is_off_without_keys():
    z, r, t, label = inputs()
    network = applied(dropout=0.5)
    same = z[:1].repeat(3, 0), r[:1].repeat(3, 0), t[:1].repeat(3, 0), label[:1].repeat(3, 0)
    twice = jnp.stack([keys()[0], keys()[1], keys()[0]])
    u = network(*same, twice)
    np.testing.assert_allclose(u[0], u[2], rtol=1e-5, atol=1e-6)
    assert (jnp.abs(u[0] - u[1]) > 1e-3).any()
    np.testing.assert_array_equal(network(z, r, t, label), applied()(z, r, t, label))


def test_dropout_masks_differ_between_blocks():
    """`layer` of models.layers.dropout: all numbers, and each once."""
    layers: list = []
    module, params = small(dropout=0.5), drawn()

    def spy(call, args, kwargs, context):
        if isinstance(context.module, Block) and context.method_name == "__call__":
            layers.append(args[3])
        return call(*args, **kwargs)

    with nn.intercept_methods(spy):
        jax.eval_shape(module.apply, params, *inputs(), keys())
    assert layers == list(range(len(layers))) and len(layers) == 10


@functools.cache
def slopes(remat: str):
    """Arrays and sizes kept for the backward pass, du/dt, and the gradient along `drawn`."""
    changes = {"channel_multipliers": (1,), "dropout": 0.3}
    module, params = small(**changes, remat=remat), drawn(**changes)
    z, r, t, label = inputs()
    toward = jax.tree.map(jnp.ones_like, (z, r, t))

    def loss(params):
        return jnp.sum(jnp.square(module.apply(params, z, r, t, label, keys())))

    def both(params):
        along = jax.jvp(lambda *x: module.apply(params, *x, label, keys()), (z, r, t), toward)
        return along[1], jax.grad(loss)(params)

    compiled = jax.jit(both).lower(params).compile()
    convolutions = str(jax.make_jaxpr(jax.grad(loss))(params)).count("conv_general_dilated[")
    return convolutions, *compiled(params)


@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=thorough)])
def test_what_is_computed_again_changes_no_number(remat):
    none, others = slopes("none"), slopes(remat)
    for a, b in zip(jax.tree.leaves(none[1:]), jax.tree.leaves(others[1:]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max()))
    # Forward, then twice backward, and where whole blocks are computed again their own once more.
    assert (others[0] > none[0]) == (remat == "full")


def test_bfloat16_is_near_float32(standard_promotion):
    z, r, t, label = inputs()
    exact, rough = applied()(z, r, t, label), applied(dtype=jnp.bfloat16)(z, r, t, label)
    assert rough.dtype == jnp.float32
    error = float(jnp.abs(rough - exact).mean() / jnp.abs(exact).mean())
    assert 1e-6 < error < 0.05, error


# Its data.


def cifar(place, **keys):
    config = cifar10.get_config()
    config.update({"data_dir": str(place)} | keys)
    return config


def png(seed: int, side: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Root of a small cifar10 with the features of TFDS's."""
    from tensorflow_datasets import features as f

    root = tmp_path_factory.mktemp("cifar")
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    spec = {
        "id": f.Text(),
        "image": f.Image(shape=(32, 32, 3), encoding_format="png"),
        "label": f.ClassLabel(names=names),
    }
    train = [{"id": f"{i}", "image": io.BytesIO(png(i)), "label": i} for i in range(10)]
    test = [{"id": "0", "image": io.BytesIO(png(99)), "label": 0}] * 2
    prepare(root, "cifar10", spec, {"train": train, "test": test}, version="3.0.2")
    return root


def test_cifar10_as_tfds_prepared_it(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    for place in ("", prepared, prepared / "cifar10", prepared / "cifar10" / "3.0.2"):
        dataset = data.load(cifar(place))
        assert (dataset.shape, dataset.num_classes) == ((32, 32, 3), 10)
        assert dataset.classes[6] == "frog" and len(dataset.heldout) == 0
        batch = data.arrays(dataset.train)
        assert sorted(batch["label"]) == list(range(10))
        for x, label in zip(batch["x"], batch["label"], strict=True):
            known = np.asarray(Image.open(io.BytesIO(png(int(label)))))
            np.testing.assert_array_equal(x, known)


def test_cifar10_as_pictures_in_class_folders(tmp_path):
    for i, name in enumerate(["cat", "dog", "dog"]):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{i}.png").write_bytes(png(i))
    dataset = data.load(cifar(tmp_path))
    assert (dataset.shape, dataset.num_classes) == ((32, 32, 3), 2)
    batch = data.arrays(dataset.train)
    assert batch["label"].tolist() == [0, 1, 1]
    np.testing.assert_array_equal(batch["x"][1], Image.open(io.BytesIO(png(1))))


def test_cifar10_that_is_not_there_is_told_with_its_mend(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError) as caught:
        data.load(cifar(""))
    for word in ("cifar10", "--data_dir", "download_and_prepare", "array_record"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
