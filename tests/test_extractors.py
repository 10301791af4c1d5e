"""Extractors: resizes, Inception against stored numbers of torch-fidelity, weights from files."""

import http.client
import io
import json
import pathlib
import urllib.error

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from models import dinov2, inception, mobilenet, resize
from pipelines import extractors
from tests import inception_case as case
from utils.cli import UserError

STORED = pathlib.Path(__file__).parent / "data" / "inception.safetensors"
RESIZES = [resize.tf1_bilinear, resize.half_pixel_bilinear, resize.pil_bicubic]


# Resizes


def linear(pictures, side, place):
    """Linear interpolation along both axes at `place(size)`, in float64; edges are repeated."""
    x = pictures.astype(np.float64)
    for axis in (1, 2):
        size = pictures.shape[axis]
        points = place(size, np.arange(side))
        x = np.apply_along_axis(
            lambda row, at, size: np.interp(at, np.arange(size), row), axis, x, points, size
        )
    return x


def pillow(pictures, side):
    """Pillow's bicubic of float channels, clipped."""
    planes = pictures.astype(np.float32).transpose(0, 3, 1, 2)
    shape = (side, side)
    flat = [
        np.asarray(Image.fromarray(plane).resize(shape, Image.Resampling.BICUBIC))
        for plane in planes.reshape(-1, *planes.shape[2:])
    ]
    return np.stack(flat).reshape(*planes.shape[:2], *shape).transpose(0, 2, 3, 1).clip(0, 255)


DEFINITIONS = {
    "tf1_bilinear": lambda x, side: linear(x, side, lambda size, i: i * size / side),
    "half_pixel_bilinear": lambda x, side: linear(
        x, side, lambda size, i: (i + 0.5) * size / side - 0.5
    ),
    "pil_bicubic": pillow,
}


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (32, 32), (64, 48), (300, 200), (512, 512)])
@pytest.mark.parametrize("function", RESIZES)
def test_a_resize_is_what_it_is_defined_as(function, size):
    pictures = case.pictures(2, *size)
    expected = DEFINITIONS[function.__name__](pictures, 99)
    found = jax.jit(function, static_argnums=1)(pictures, 99)
    assert found.shape == expected.shape and found.dtype == jnp.float32
    assert np.abs(found - expected).max() < 0.01


@pytest.mark.parametrize("function", RESIZES)
def test_a_resize_to_the_same_size_changes_nothing(function):
    pictures = case.pictures(2, 50, 50)
    np.testing.assert_allclose(function(pictures, 50), pictures, atol=1e-3)


@pytest.mark.parametrize("function", RESIZES)
def test_a_resize_keeps_what_is_even(function):
    for size in ((20, 30), (100, 70)):
        even = np.full((1, *size, 1), 201, np.uint8)
        np.testing.assert_allclose(function(even, 60), np.full((1, 60, 60, 1), 201.0), rtol=1e-6)


def test_the_resizes_differ():
    """By far more than their errors, so that no one can stand for another."""
    pictures = case.pictures(2, 64, 64)
    a, b, c = (np.asarray(function(pictures, 99)) for function in RESIZES)
    assert min(np.abs(a - b).max(), np.abs(b - c).max(), np.abs(a - c).max()) > 10


# Inception


@pytest.fixture(scope="module")
def tensors():
    return case.tensors(seed=1)


@pytest.fixture(scope="module")
def weights(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return str(path)


@pytest.fixture(scope="module")
def network(tensors):
    """The network with its random weights, compiled once for two pictures."""
    params = inception.params_of(tensors)
    apply = jax.jit(lambda params, x: inception.Inception().apply({"params": params}, x))
    return lambda x: apply(params, x)


@pytest.mark.parametrize("protocol", case.STORED)
def test_features_are_those_of_torch_fidelity(protocol, network):
    """Numbers that tests/oracles/write_cases.py stored."""
    size, wanted = case.STORED[protocol]
    found = network(inception.PROTOCOLS[protocol](case.pictures(2, *size)))
    assert {name: value.shape for name, value in found.items()} == {
        "pool": (2, 2048),
        "spatial": (2, 2023),
        "logits": (2, 1008),
    }
    stored = safetensors.numpy.load_file(STORED)
    assert sum(name.startswith(f"{protocol}/") for name in stored) == len(wanted)
    for name in wanted:
        assert found[name].dtype == jnp.float32
        assert case.distance(found[name], stored[f"{protocol}/{name}"]) < 1e-3


@pytest.mark.parametrize(("protocol", "white"), [("tf", 127 / 128), ("clean", 127 / 128)])
def test_the_range_of_the_graph(protocol, white):
    assert ranges(protocol) == pytest.approx((-1.0, 0.0, white), abs=1e-6)


def test_the_range_of_pytorch_fid():
    assert ranges("pytorch") == pytest.approx((-1.0, 128 / 127.5 - 1, 1.0), abs=1e-6)


def ranges(protocol):
    """What black, the grey 128 and white become."""
    pictures = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 128, 255)])
    x = inception.PROTOCOLS[protocol](pictures)
    assert x.shape == (3, 299, 299, 3)
    assert np.ptp(np.asarray(x), axis=(1, 2, 3)).max() < 1e-6
    return tuple(float(value) for value in x.mean((1, 2, 3)))


def test_logits_are_without_the_bias(tensors, network):
    found = network(np.zeros((2, 299, 299, 3), np.float32))
    expected = np.asarray(found["pool"], np.float64) @ tensors["fc.weight"].T.astype(np.float64)
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4)


# Its tensors


def test_tensors_of_the_known_file(tensors, shared):
    manifest = json.loads((shared / "weights/fid_inception_manifest.json").read_text())
    assert len(manifest) == 566
    assert {name: list(array.shape) for name, array in tensors.items()} == manifest


# What a tensor does where all others do nothing: in the kernel or in the bias.
EFFECTS = {
    "conv.weight": ("kernel", lambda v: v.transpose(2, 3, 1, 0)),
    "bn.weight": ("kernel", lambda v: v),
    "bn.running_var": ("kernel", lambda v: (v + 0.001) ** -0.5),
    "bn.bias": ("bias", lambda v: v),
    "bn.running_mean": ("bias", lambda v: -v),
}


def test_values_of_the_known_file(tensors, shared):
    """Of the 25 tensors that could be had, at most one of a convolution and its norm at a time."""
    with np.load(shared / "weights/fid_inception_fragment.npz") as file:
        known = {name: file[name] for name in file.files if not name.endswith("tracked")}
    assert len(known) == 25
    idle = {"running_var": 1 - inception.EPS, "bias": 0.0, "running_mean": 0.0}
    idle = {
        name: np.full_like(a, idle.get(name.split(".")[-1], 1.0)) for name, a in tensors.items()
    }
    left = dict(known)
    while left:
        now = {name.rsplit(".", 2)[0]: name for name in left}
        params = flat(inception.params_of(idle | {name: left.pop(name) for name in now.values()}))
        for module, name in now.items():
            leaf, effect = EFFECTS[name.removeprefix(f"{module}.")]
            found = params[f"{module.replace('.', '/')}/{leaf}"]
            expected = np.broadcast_to(effect(known[name].astype(np.float64)), found.shape)
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def flat(tree, path=()):
    """Nested dicts → one, with names joined by "/"."""
    if not isinstance(tree, dict):
        return {"/".join(path): tree}
    return {k: v for name, branch in tree.items() for k, v in flat(branch, (*path, name)).items()}


def test_step_counters_may_lack(tensors):
    without = {name: a for name, a in tensors.items() if not name.endswith("tracked")}
    assert len(without) == 566 - 94
    both = flat(inception.params_of(tensors)), flat(inception.params_of(without))
    assert both[0].keys() == both[1].keys()
    assert all(np.array_equal(both[0][name], both[1][name]) for name in both[0])


@pytest.mark.parametrize("wrong", ["missing", "unknown", "of another shape"])
def test_wrong_tensors_are_named(wrong, tensors):
    spoilt = dict(tensors)
    if wrong == "unknown":
        spoilt["Mixed_8a.conv.weight"] = np.zeros(1)
    else:
        del spoilt["Mixed_6d.branch1x1.conv.weight"]
    if wrong == "of another shape":
        spoilt["Mixed_6d.branch1x1.conv.weight"] = np.zeros((192, 768, 1, 7))
    with pytest.raises(ValueError, match=rf"1 .*{wrong} \(first Mixed_"):
        inception.params_of(spoilt)


# Extractors


def mobilenet_tensors():
    """Tensors of MobileNet that mean nothing, scaled so that ReLU6 lets something through."""
    rng = np.random.default_rng(0)
    made = {name: rng.random(shape, np.float32) for name, shape in mobilenet.shapes().items()}
    for name, array in made.items():
        if name.endswith("kernel"):
            inputs = 9 if name.endswith("depthwise_kernel") else np.prod(array.shape[:-1])
            array[...] = (array - 0.5) * np.sqrt(24 / inputs)
    return made


def dinov2_tensors(width=64):
    """Tensors of a DINOv2 of one block, in timm's names, that mean nothing."""
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")
    shapes = {f"blocks.0.{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"blocks.0.{name}.bias": shape[:1] for name, shape in layers.items()}
    shapes |= {f"blocks.0.{name}": (width,) for name in vectors}
    shapes |= {"cls_token": (1, 1, width), "pos_embed": (1, 257, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    rng = np.random.default_rng(0)
    return {name: rng.random(shape, np.float32) for name, shape in shapes.items()}


def test_protocols_are_those_of_the_networks():
    """The first is the default; every one has a resize that its words name."""
    networks = {"inception": inception, "mobilenet": mobilenet, "dinov2": dinov2}
    assert {name: tuple(m.PROTOCOLS) for name, m in networks.items()} == extractors.PROTOCOLS
    assert extractors.PROTOCOLS["inception"][0] == "tf"


def test_an_extractor_is_pictures_to_features(weights, tensors, network):
    extractor = extractors.load("inception", "", weights)
    assert (extractor.name, extractor.protocol) == ("inception", "tf")
    assert "TF1 bilinear to 299, (x − 128)/128" in extractor.words
    traces = []

    @jax.jit
    def features(apply, pictures):
        traces.append(1)
        return apply(pictures)

    pictures = case.pictures(2, 32, 32)
    found = features(extractor.apply, pictures)
    expected = network(inception.tf(pictures))
    for name, value in expected.items():
        assert case.distance(found[name], np.asarray(value)) < 1e-4
    # Other weights are other arguments, not another program.
    doubled = jax.tree.map(lambda leaf: 2 * leaf, extractor.apply)
    assert np.abs(features(doubled, pictures)["pool"] - found["pool"]).max() > 0.1
    again = extractors.load("inception", "tf", weights)
    features(again.apply, pictures)
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["mobilenet", "dinov2"])
def test_grey_pictures_are_taken_as_rgb(name, tmp_path):
    made = {"mobilenet": mobilenet_tensors, "dinov2": dinov2_tensors}[name]()
    np.savez(tmp_path / "weights.npz", **made)
    extractor = extractors.load(name, weights=str(tmp_path / "weights.npz"))
    apply = jax.jit(lambda apply, x: apply(x)["pool"])
    grey = case.pictures(2, 40, 40)[..., :1]
    found = apply(extractor.apply, grey)
    assert found.shape == (2, 768 if name == "mobilenet" else 64) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, apply(extractor.apply, grey.repeat(3, 3)), rtol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_a_fingerprint_is_of_weights_name_and_protocol(weights, tensors, tmp_path):
    """Of the numbers, whatever file they lie in."""
    np.savez(tmp_path / "same.npz", **tensors)
    changed = tensors | {"Mixed_6d.branch1x1.bn.bias": tensors["Mixed_6d.branch1x1.bn.bias"] + 1e-3}
    safetensors.numpy.save_file(changed, tmp_path / "changed.safetensors")
    loaded = {
        "safetensors": extractors.load("inception", "tf", weights),
        "npz": extractors.load("inception", "tf", str(tmp_path / "same.npz")),
        "clean": extractors.load("inception", "clean", weights),
        "changed": extractors.load("inception", "tf", str(tmp_path / "changed.safetensors")),
    }
    prints = {name: extractor.fingerprint for name, extractor in loaded.items()}
    assert prints.pop("npz") == prints["safetensors"]
    assert len(set(prints.values())) == 3
    assert all(len(p) == 12 and int(p, 16) >= 0 for p in prints.values())
    assert loaded["clean"].words.rpartition(" ")[2] == loaded["npz"].words.rpartition(" ")[2]


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_files_are_computed_in_float32(dtype, tmp_path):
    made = {name: array.astype(dtype) for name, array in dinov2_tensors().items()}
    safetensors.numpy.save_file(made, tmp_path / "half.safetensors")
    made = {name: array.astype(np.float32) for name, array in made.items()}
    safetensors.numpy.save_file(made, tmp_path / "single.safetensors")
    half, single = (
        extractors.load("dinov2", weights=str(tmp_path / f"{name}.safetensors"))
        for name in ("half", "single")
    )
    assert half.fingerprint == single.fingerprint
    assert {leaf.dtype for leaf in jax.tree.leaves(half.apply)} == {jnp.dtype("float32")}


# What goes wrong


def line(call):
    """The one line of a UserError."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text


def test_unknown_names_and_protocols():
    assert "inception, mobilenet, dinov2" in line(lambda: extractors.load("inceptoin"))
    assert "tf, clean, pytorch" in line(lambda: extractors.load("inception", "legacy"))
    assert "only clean" in line(lambda: extractors.load("dinov2", "tf"))


def test_files_that_are_none(weights, tmp_path):
    def told(name, file):
        return line(lambda: extractors.load(name, weights=str(tmp_path / file)))

    (tmp_path / "weights.pth").write_bytes(b"")
    (tmp_path / "weights.txt").write_bytes(b"")
    (tmp_path / "text.npz").write_bytes(b"text")
    (tmp_path / "text.safetensors").write_bytes(b"text")
    (tmp_path / "cut.safetensors").write_bytes(pathlib.Path(weights).read_bytes()[:100_000])
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], dtype=object))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    assert "does not exist" in told("inception", "none.safetensors")
    assert "is a folder" in told("inception", "")
    assert "scripts/convert_inception.py --file=" in told("inception", "weights.pth")
    assert ".safetensors or .npz" in told("inception", "weights.txt")
    for file in ("text.npz", "text.safetensors", "cut.safetensors", "pickled.npz"):
        assert "damaged" in told("inception", file)
    for name in extractors.PROTOCOLS:
        assert f"does not hold the weights of {name}: " in told(name, "other.npz")
    assert "1 unknown (first a)" in told("inception", "other.npz")
    assert "needs --weights" in line(lambda: extractors.load("mobilenet"))


def test_dinov2_from_the_hub(monkeypatch, tmp_path):
    """The default is the network of the paper; offline it is one line."""
    import huggingface_hub

    asked = []
    file = tmp_path / extractors.DINOV2_FILE
    safetensors.numpy.save_file(dinov2_tensors(), file)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a: asked.append(a) or str(file))
    hub = extractors.load("dinov2"), extractors.load("dinov2", weights="me/mine")
    assert [name for name, _ in asked] == ["facebook/dinov2-large", "me/mine"]
    folder = extractors.load("dinov2", weights=str(tmp_path))
    assert hub[0].fingerprint == hub[1].fingerprint == folder.fingerprint

    def offline(*_):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    text = line(lambda: extractors.load("dinov2"))
    assert "nor from the hub (no network)" in text and "--weights" in text
    assert "does not exist" in line(lambda: extractors.load("dinov2", weights="runs/a.safetensors"))


# Inception's download


@pytest.fixture
def served(monkeypatch, weights):
    """A network that serves `served.content`, and a conversion that needs no torch."""

    class Served:
        content, asked = b"the known file", 0

        def open(self, url, timeout):
            assert url == extractors.URL
            self.asked += 1
            if isinstance(self.content, Exception):
                raise self.content
            return io.BytesIO(self.content)

    served = Served()
    digest = extractors.hashlib.sha256(served.content).hexdigest()
    monkeypatch.setattr(extractors.urllib.request, "urlopen", served.open)
    monkeypatch.setattr(extractors, "SHA256", digest)
    monkeypatch.setattr(extractors.importlib.util, "find_spec", lambda name: name)

    def convert(source, to):
        assert source.read_bytes() == b"the known file"
        to.write_bytes(pathlib.Path(weights).read_bytes())

    monkeypatch.setattr(extractors, "convert", convert)
    return served


def test_a_download_is_kept(served, weights, tmp_path):
    cache = tmp_path / "cache"
    first, again = (extractors.load("inception", cache_dir=cache) for _ in range(2))
    assert served.asked == 1
    assert first.fingerprint == extractors.load("inception", weights=weights).fingerprint
    assert again.fingerprint == first.fingerprint
    assert [path.name for path in cache.iterdir()] == [extractors.INCEPTION_FILE]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>please log in", "not the known"),
        (urllib.error.URLError("no route to host"), "no route to host"),
        (http.client.IncompleteRead(b"half"), "IncompleteRead"),
    ],
)
def test_a_download_that_fails(served, content, said, tmp_path):
    served.content = content
    text = line(lambda: extractors.load("inception", cache_dir=tmp_path))
    said = "sha256" if said == "not the known" else said
    assert all(word in text for word in (said, extractors.URL, "convert_inception.py", "--weights"))
    assert list(tmp_path.iterdir()) == []


def test_without_torch_nothing_is_fetched(served, monkeypatch, tmp_path):
    monkeypatch.setattr(extractors.importlib.util, "find_spec", lambda name: None)
    text = line(lambda: extractors.load("inception", cache_dir=tmp_path))
    words = ("pip install torch", extractors.URL, "convert_inception.py", "--weights")
    assert all(word in text for word in words)
    assert served.asked == 0


@pytest.mark.parametrize(("process", "shared_cache"), [(0, True), (1, True), (1, False)])
def test_process_0_fetches_for_all(process, shared_cache, served, monkeypatch, tmp_path):
    """The others wait for it; one whose cache is its own then fetches too."""
    meetings = []

    def meet(name):
        meetings.append(served.asked)
        if process and shared_cache:
            (tmp_path / extractors.INCEPTION_FILE).write_bytes(b"by process 0")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(extractors.multihost_utils, "sync_global_devices", meet)
    assert extractors._inception_file(tmp_path).exists()
    assert meetings == [0 if process else 1]
    assert served.asked == (0 if process and shared_cache else 1)


def test_where_process_0_fails_the_others_do_not_wait(served, monkeypatch, tmp_path):
    meetings = []
    served.content = OSError("no network")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(extractors.multihost_utils, "sync_global_devices", meetings.append)
    line(lambda: extractors._inception_file(tmp_path))
    assert len(meetings) == 1
