"""Files of statistics: ours and other tools', and one line for each that cannot be used."""

import zipfile

import numpy as np
import pytest

from utils import statistics
from utils.cli import UserError
from utils.fid import FeatureStats, Gaussian, frechet_distance

D = 6


def sample(seed: int = 0, rows: int = 50, d: int = D) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 2.0, size=(rows, d)).astype(np.float32)


def moments(seed: int = 0, d: int = D) -> tuple[np.ndarray, np.ndarray]:
    x = sample(seed, d=d).astype(np.float64)
    return x.mean(0), np.cov(x, rowvar=False)


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


# Reading what we write.


def test_what_is_written_is_read(tmp_path):
    pool, spatial = (FeatureStats.of(sample(seed, d=d)) for seed, d in ((0, D), (1, 4)))
    about = {"features": "inception", "image_size": 256, "pictures": "ImageNet, ten"}
    path = tmp_path / "folder" / "s.npz"
    statistics.write(path, pool, spatial, sample(), about)
    found = statistics.read(path)
    for side, written in ((found.pool, pool), (found.spatial, spatial)):
        np.testing.assert_array_equal(side.mean, written.mean)
        np.testing.assert_array_equal(side.cov, written.cov)
        assert side.count == 50
    np.testing.assert_array_equal(found.features, sample())
    assert isinstance(found.features, np.memmap)
    assert found.about == about | {"count": 50}
    assert frechet_distance(pool, found.pool) == pytest.approx(0, abs=1e-6)
    assert [p.name for p in path.parent.iterdir()] == ["s.npz"]


def test_other_tools_read_ours_without_pickle(tmp_path):
    statistics.write(tmp_path / "s.npz", Gaussian(*moments()), about={"features": "mobilenet"})
    with np.load(tmp_path / "s.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"mu", "sigma", "count", "about"}
        assert all(arrays[name].dtype != object for name in arrays)
        assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64


def test_a_memory_map_of_features_is_written(tmp_path):
    np.save(tmp_path / "x.npy", sample())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    statistics.write(tmp_path / "s.npz", FeatureStats.of(mapped), features=mapped)
    np.testing.assert_array_equal(statistics.read(tmp_path / "s.npz").features, sample())


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "s.npz"
    statistics.write(path, FeatureStats.of(sample()))
    before = path.read_bytes()

    def broken(file, **_):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(OSError, match="no space"):
        statistics.write(path, FeatureStats.of(sample(1)))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


# Reading others'.


@pytest.mark.parametrize(
    "names", [("mu", "sigma"), ("ref_mu", "ref_sigma")], ids=["jax-flow", "MeanFlow"]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_other_names(tmp_path, names, dtype, save):
    mean, cov = (value.astype(dtype) for value in moments())
    save(tmp_path / "s.npz", **dict(zip(names, (mean, cov), strict=True)))
    found = statistics.read(tmp_path / "s.npz")
    np.testing.assert_array_equal(found.pool.mean, mean.astype(np.float64))
    np.testing.assert_allclose(found.pool.cov, cov, rtol=1e-6)
    assert found.pool.cov.dtype == np.float64
    assert (found.pool.count, found.spatial, found.features, found.about) == (0, None, None, {})


def test_adm(tmp_path):
    (mean, cov), (mean_s, cov_s) = moments(), moments(1, d=4)
    arrays = {"mu": mean, "sigma": cov, "mu_s": mean_s, "sigma_s": cov_s}
    plain = statistics.read(saved(tmp_path / "a.npz", **arrays))
    np.testing.assert_array_equal(plain.spatial.mean, mean_s)
    pictures = np.zeros((3, 8, 8, 3), np.uint8)
    path = saved(tmp_path / "b.npz", **arrays, arr_0=pictures)
    assert statistics.read(path).fingerprint == plain.fingerprint
    # The pictures are not even looked at: their bytes may be damaged.
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("arr_0.npy").header_offset + 250
    path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    assert statistics.read(path).fingerprint == plain.fingerprint


def test_the_fingerprint_is_of_the_numbers(tmp_path):
    mean, cov = moments()
    one = statistics.read(saved(tmp_path / "one.npz", mu=mean, sigma=cov)).fingerprint
    again = statistics.read(saved(tmp_path / "again.npz", ref_mu=mean, ref_sigma=cov)).fingerprint
    statistics.write(tmp_path / "ours.npz", Gaussian(mean, cov, 50), about={"a": 1})
    assert one == again == statistics.read(tmp_path / "ours.npz").fingerprint
    assert len(one) == 12
    int(one, 16)
    changed = [
        {"mu": mean + 1e-9, "sigma": cov},
        {"mu": mean, "sigma": cov * (1 + 1e-9)},
        {"mu": mean, "sigma": cov, "mu_s": mean, "sigma_s": cov},
        {"mu": mean, "sigma": cov, "features": sample()},
        {"mu": mean, "sigma": cov, "features": sample(1)},
    ]
    found = [statistics.read(saved(tmp_path / f"{i}.npz", **c)) for i, c in enumerate(changed)]
    assert len({one, *(f.fingerprint for f in found)}) == 6


def test_packed_and_empty_features(tmp_path):
    mean, cov = moments()
    np.savez_compressed(tmp_path / "s.npz", mu=mean, sigma=cov, features=sample())
    np.testing.assert_array_equal(statistics.read(tmp_path / "s.npz").features, sample())
    statistics.write(tmp_path / "e.npz", Gaussian(mean, cov), features=np.empty((0, D)))
    assert statistics.read(tmp_path / "e.npz").features.shape == (0, D)


# What is no file of statistics.


def test_no_npz(tmp_path):
    with pytest.raises(UserError, match="is no file"):
        statistics.read(tmp_path / "none.npz")
    with pytest.raises(UserError, match="is no file"):
        statistics.read(tmp_path)
    np.save(tmp_path / "mu.npy", moments()[0])
    (tmp_path / "text.npz").write_text("mu = 3")
    (tmp_path / "empty.npz").touch()
    for name in ("mu.npy", "text.npz", "empty.npz"):
        with pytest.raises(UserError, match=r"no \.npz file"):
            statistics.read(tmp_path / name)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.99])
def test_a_file_cut_short(tmp_path, keep):
    path = saved(tmp_path / "s.npz", mu=moments()[0], sigma=moments()[1])
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(UserError, match="cut short"):
        statistics.read(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file(tmp_path, save):
    path = tmp_path / "s.npz"
    save(path, mu=moments()[0], sigma=moments()[1])
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 3, 2 * len(data) // 3):
        data[place] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read"):
        statistics.read(path)


def test_pickled_content_is_not_read(tmp_path):
    path = saved(tmp_path / "s.npz", mu=np.array([{}, None]), sigma=np.eye(2))
    with pytest.raises(UserError, match="pickled objects, which are not read"):
        statistics.read(path)


GOOD = dict(zip(("mu", "sigma"), moments(), strict=True))
LOPSIDED = GOOD["sigma"] + np.triu(np.ones((D, D)), 1)
WRONG = {
    "no names": ({"arr_0": np.zeros(3)}, "holds arr_0, but no mu and sigma"),
    "nothing": ({}, "holds nothing, but no mu and sigma"),
    "half": ({"mu": GOOD["mu"]}, "holds mu, but no mu and sigma"),
    "flat": (GOOD | {"sigma": GOOD["sigma"].ravel()}, "are no mean"),
    "other sizes": (GOOD | {"mu": np.zeros(5)}, "are no mean"),
    "a scalar": (GOOD | {"mu": np.float64(3)}, "are no mean"),
    "empty": ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "are no mean"),
    "integers": (GOOD | {"mu": np.zeros(D, int)}, "not floating"),
    "a NaN": (GOOD | {"mu": np.full(D, np.nan)}, "mu or sigma is not finite"),
    "infinity": (GOOD | {"sigma": np.full((D, D), np.inf)}, "mu or sigma is not finite"),
    "lopsided": (GOOD | {"sigma": LOPSIDED}, "not symmetric"),
    "negative": (GOOD | {"sigma": -np.eye(D)}, "variances below 0"),
    "spatial": (GOOD | {"mu_s": np.zeros(3), "sigma_s": np.eye(4)}, "mu_s of shape"),
    "features of another width": (GOOD | {"features": sample(d=5)}, "as mu is"),
    "features not finite": (GOOD | {"features": np.full((2, D), np.nan, "f4")}, "not finite"),
    "about": (GOOD | {"about": np.array("{")}, "cannot be read"),
    "about a list": (GOOD | {"about": np.array("[]")}, "cannot be read"),
    "count": (GOOD | {"count": np.zeros(3)}, "cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_told_in_one_line(tmp_path, case):
    arrays, told = WRONG[case]
    with pytest.raises(UserError, match=told) as error:
        statistics.read(saved(tmp_path / "s.npz", **arrays))
    assert "\n" not in str(error.value)
    assert "s.npz" in str(error.value)


def test_rounding_of_float32_is_no_lopsidedness(tmp_path):
    mean, cov = moments()
    noisy = cov.astype(np.float32) * (1 + 1e-6 * np.random.default_rng(0).normal(size=cov.shape))
    found = statistics.read(saved(tmp_path / "s.npz", mu=mean, sigma=noisy))
    np.testing.assert_array_equal(found.pool.cov, found.pool.cov.T)
