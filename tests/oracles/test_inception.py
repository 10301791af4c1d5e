"""Our Inception, its protocols and the converter against torch: `make oracles` runs this."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

from models import inception, resize
from pipelines import extractors
from tests import inception_case as case
from tests.conftest import ROOT, THOROUGH
from tests.oracles import torch_inception as oracle


@pytest.fixture(scope="module")
def theirs():
    return oracle.Oracle(seed=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    safetensors.numpy.save_file(case.tensors(seed=1), path)
    return str(path)


@pytest.mark.parametrize("protocol", list(inception.PROTOCOLS))
def test_features_from_pictures_of_several_sizes(protocol, theirs, weights):
    ours = extractors.load("inception", protocol, weights)
    apply = jax.jit(lambda apply, x: apply(x))
    sizes = case.SIZES if protocol == "tf" and THOROUGH else case.SIZES[2:5:2]
    for height, width in sizes:
        pictures = case.pictures(2, height, width)
        expected = theirs(pictures, protocol)
        found = apply(ours.apply, pictures)
        shares = {name: case.distance(found[name], value) for name, value in expected.items()}
        print(protocol, (height, width), shares)
        assert max(shares.values()) < 1e-3
        assert all(
            np.abs(found[name] - value).max() < 1e-5 * np.abs(value).max()
            for name, value in expected.items()
        )


@pytest.mark.parametrize("side", [299, 224])
@pytest.mark.parametrize("name", ["tf1_bilinear", "half_pixel_bilinear", "pil_bicubic"])
def test_resizes(name, side):
    for height, width in [*case.SIZES, (1, 1), (2, 3), (1024, 700)]:
        pictures = case.pictures(2, height, width)
        found = jax.jit(getattr(resize, name), static_argnums=1)(pictures, side)
        expected = getattr(oracle, name)(pictures, side)
        assert found.shape == expected.shape == (2, side, side, 3)
        assert np.abs(found - expected).max() < 0.001


def test_the_converter_keeps_every_tensor(tmp_path, shared):
    """The 566 names of the known file, the values that could be had among them."""
    tensors = case.tensors(seed=1)
    manifest = json.loads((shared / "weights/fid_inception_manifest.json").read_text())
    assert len(manifest) == 566
    assert {name: list(a.shape) for name, a in tensors.items()} == manifest
    with np.load(shared / "weights/fid_inception_fragment.npz") as file:
        tensors |= {name: file[name] for name in file.files if name in tensors}
    source = tmp_path / "pt_inception.pth"
    torch.save({name: torch.tensor(a) for name, a in tensors.items()}, source)
    done = converted(source)
    assert done.returncode == 0, done.stderr
    assert extractors.checksum(source) in done.stdout and "not the known" in done.stdout
    found = safetensors.numpy.load_file(source.with_suffix(".safetensors"))
    assert found.keys() == manifest.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert "does not exist" in converted(tmp_path / "none.pth").stderr
    again = converted(source)
    assert again.returncode == 2 and "is there already" in again.stderr


def converted(source):
    command = [sys.executable, "scripts/convert_inception.py", f"--file={source}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


class Harmful:
    """Runs a command where it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (self.path.touch, ())


def test_the_converter_runs_no_code(tmp_path):
    source = tmp_path / "weights.pth"
    torch.save({"fc.weight": Harmful(tmp_path / "ran")}, source)
    done = converted(source)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "ran").exists()
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))


def test_a_download_is_converted_and_kept(tmp_path, monkeypatch):
    """From a file that is served as the known one is."""
    source = tmp_path / "served.pth"
    torch.save({name: torch.tensor(a) for name, a in case.tensors(seed=1).items()}, source)
    asked = []

    def serve(url, timeout):
        asked.append(url)
        return source.open("rb")

    monkeypatch.setattr(extractors.urllib.request, "urlopen", serve)
    monkeypatch.setattr(extractors, "SHA256", extractors.checksum(source))
    first = extractors.load("inception", cache_dir=tmp_path / "cache")
    again = extractors.load("inception", cache_dir=tmp_path / "cache")
    assert asked == [extractors.URL]
    assert first.fingerprint == again.fingerprint
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [extractors.INCEPTION_FILE]
