"""Splits, batches as a function of (seed, step), and every place that data can come from."""

import contextlib
import io
import itertools
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs.base import get_config
from utils import data
from utils.cli import UserError
from utils.sources import ArraySource, CorruptPicture, PictureSource, centre_crop, decode


def config(**keys):
    config = get_config()
    config.update(keys)
    return config


def numbers(n: int) -> ArraySource:
    """Pictures 1 × 2 that hold their index on the left and 255 on the right."""
    x = np.stack([np.arange(n), np.full(n, 255)], axis=1).astype(np.uint8)
    return ArraySource(x.reshape(n, 1, 2, 1), np.arange(n, dtype=np.int32))


def take(n: int, source, **keys) -> list[dict[str, np.ndarray]]:
    with contextlib.closing(data.batches(source, **keys)) as stream:
        return list(itertools.islice(stream, n))


def assert_equal_batches(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() == {"x", "label", "position"}
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


# Batches.


@pytest.mark.parametrize("n, batch_size", [(13, 4), (12, 4), (8, 12)])
def test_every_epoch_has_each_item_once_in_an_order_of_its_own(n, batch_size):
    stream = take(n, numbers(n), batch_size=batch_size, seed=0)  # n batches: batch_size epochs
    epochs = np.concatenate([batch["label"] for batch in stream]).reshape(batch_size, n)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(n), (batch_size, 1)))
    assert len(np.unique(epochs, axis=0)) == batch_size


def test_batches_hold_pictures_labels_and_positions():
    batch = take(1, numbers(10), batch_size=4, seed=0)[0]
    assert batch["x"].shape == (4, 1, 2, 1) and batch["x"].dtype == np.uint8
    assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32
    assert batch["position"].dtype == np.int32
    np.testing.assert_array_equal(batch["position"], np.arange(4))
    np.testing.assert_array_equal(batch["x"][:, 0, 0, 0], batch["label"])


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 30), hosts=st.sampled_from([1, 2, 3]), seed=st.integers(0, 2**40))
def test_hosts_join_to_the_same_global_stream(n, hosts, seed):
    keys = {"batch_size": 6, "seed": seed, "flip": True}
    whole = take(4, numbers(n), **keys)
    parts = [take(4, numbers(n), shard=(host, hosts), **keys) for host in range(hosts)]
    joined = []
    for step in range(4):
        rows = np.argsort(np.concatenate([part[step]["position"] for part in parts]))
        keys = ("x", "label", "position")
        joined.append({k: np.concatenate([p[step][k] for p in parts])[rows] for k in keys})
    assert_equal_batches(whole, joined)


@settings(deadline=None, max_examples=20)
@given(start=st.integers(0, 20), n=st.integers(1, 30), host=st.sampled_from([0, 1]))
def test_a_resumed_stream_is_the_uninterrupted_one(start, n, host):
    keys = {"batch_size": 8, "seed": 5, "flip": True, "shard": (host, 2)}
    whole = take(start + 3, numbers(n), **keys)
    assert_equal_batches(whole[start:], take(3, numbers(n), start_step=start, **keys))


def test_flip_mirrors_half_of_the_pictures_and_moves_nothing_else():
    keys = {"batch_size": 100, "start_step": 7}
    plain = take(20, numbers(200), seed=1, **keys)
    flipped = take(20, numbers(200), seed=1, flip=True, **keys)
    again = take(20, numbers(200), seed=1, flip=True, **keys)
    assert_equal_batches(flipped, again)
    coins = []
    for before, after in zip(plain, flipped, strict=True):
        np.testing.assert_array_equal(before["label"], after["label"])
        coin = after["x"][:, 0, 0, 0] == 255
        expected = np.where(coin[:, None, None, None], before["x"][:, :, ::-1], before["x"])
        np.testing.assert_array_equal(after["x"], expected)
        coins.append(coin)
    assert abs(np.mean(coins) - 0.5) < 5 * 0.5 / np.sqrt(2000)
    assert len(np.unique(coins, axis=0)) == 20
    other = take(1, numbers(200), seed=2, flip=True, **keys)[0]
    assert np.any((other["x"][:, 0, 0, 0] == 255) != coins[0])


def test_flipping_leaves_the_data_set_as_it_is():
    source = numbers(10)
    take(3, source, batch_size=10, seed=0, flip=True)
    np.testing.assert_array_equal(source.x, numbers(10).x)


@pytest.mark.parametrize(
    "keys, mend",
    [
        ({"batch_size": 8, "shard": (0, 3)}, "--batch_size=9"),
        ({"batch_size": 1, "shard": (0, 3)}, "--batch_size=3"),
        ({"batch_size": 0}, "--batch_size=1"),
        ({"seed": -1}, "--seed=0"),
        ({"source": numbers(0)}, "--holdout"),
        ({"source": ArraySource(np.zeros((4, 2)), np.zeros(4)), "flip": True}, "--flip=False"),
    ],
)
def test_what_cannot_be_batched_is_told_at_once(keys, mend):
    keys = {"source": numbers(10), "batch_size": 4, "seed": 0} | keys
    assert_one_line(lambda: data.batches(keys.pop("source"), **keys), mend)


def assert_one_line(call, mend: str, kind: type[UserError] = UserError):
    with pytest.raises(kind) as caught:
        call()
    assert mend in str(caught.value) and "\n" not in str(caught.value)


# For evaluation.


@pytest.mark.parametrize("size", [1, 4, 10, 100])
def test_chunks_join_to_arrays(size):
    source = numbers(10)
    parts = list(data.chunks(source, size))
    assert [len(part["x"]) for part in parts[:-1]] == [size] * (len(parts) - 1)
    for key, whole in data.arrays(source).items():
        np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), whole)


def test_arrays_takes_items_by_index():
    some = data.arrays(numbers(10), [7, 2, 2])
    np.testing.assert_array_equal(some["label"], [7, 2, 2])
    np.testing.assert_array_equal(some["x"][0], numbers(10)[7]["x"])


# Data sets in memory.


def test_digits_are_split_once_and_for_all():
    from sklearn.datasets import load_digits

    digits = data.load(config(dataset_name="digits", holdout=0.1))
    assert (len(digits.train), len(digits.heldout)) == (1617, 180)
    assert (digits.shape, digits.num_classes) == ((8, 8, 1), 10)
    assert digits.fingerprint == "4dfe2767f084"
    parts = [data.arrays(digits.train), data.arrays(digits.heldout)]
    found = np.concatenate([np.c_[p["x"].reshape(-1, 64), p["label"]] for p in parts])
    bunch = load_digits()
    known = np.c_[np.rint(bunch.data * 255 / 16), bunch.target]
    np.testing.assert_array_equal(rows_sorted(found), rows_sorted(known))


def rows_sorted(x: np.ndarray) -> np.ndarray:
    return x[np.lexsort(x.T)].astype(int)


def test_the_split_follows_holdout_and_not_the_seed():
    base = data.load(config(dataset_name="digits"))
    assert data.load(config(dataset_name="digits", seed=7)).fingerprint == base.fingerprint
    none = data.load(config(dataset_name="digits", holdout=0.0))
    assert len(none.heldout) == 0 and none.fingerprint != base.fingerprint
    assert data.arrays(none.heldout)["x"].shape == (0, 8, 8, 1)
    assert list(data.chunks(none.heldout, 4)) == []


@pytest.mark.parametrize("name", data.TOYS)
def test_toys_hold_out_points_of_their_own(name):
    toy = data.load(config(dataset_name=name))
    train, heldout = data.arrays(toy.train)["x"], data.arrays(toy.heldout)["x"]
    assert train.shape == (100_000, 2) and heldout.shape == (20_000, 2)
    assert train.dtype == np.float32 and (toy.shape, toy.num_classes) == ((2,), 0)
    assert not {tuple(p) for p in train.tolist()} & {tuple(p) for p in heldout.tolist()}
    batch = take(1, toy.train, batch_size=8, seed=0)[0]
    assert batch["x"].shape == (8, 2) and not batch["label"].any()


def small_mnist(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(2 * n, 28, 28), dtype=np.uint8)
    labels = rng.integers(10, size=2 * n, dtype=np.uint8)
    names = ["train_images", "train_labels", "test_images", "test_labels"]
    return dict(zip(names, [images[n:], labels[n:], images[:n], labels[:n]], strict=True))


def assert_is_mnist(dataset: data.Dataset, known: dict[str, np.ndarray]):
    assert (dataset.shape, dataset.num_classes) == ((28, 28, 1), 10)
    for source, split in [(dataset.train, "train"), (dataset.heldout, "test")]:
        found = data.arrays(source)
        np.testing.assert_array_equal(found["x"][..., 0], known[f"{split}_images"])
        np.testing.assert_array_equal(found["label"], known[f"{split}_labels"])
        assert found["label"].dtype == np.int32


def test_mnist_is_read_from_an_npz_of_either_naming(tmp_path, monkeypatch):
    known = small_mnist(5)
    keras = dict(zip(["x_train", "y_train", "x_test", "y_test"], known.values(), strict=True))
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "mnist.npz", **known)
    np.savez(tmp_path / "keras.npz", **keras)
    monkeypatch.chdir(tmp_path)
    for place in ("", "data", "data/mnist.npz", str(tmp_path / "keras.npz")):
        assert_is_mnist(data.load(config(dataset_name="mnist", data_dir=place)), known)


def test_mnist_is_read_as_tfds_prepares_it_without_tensorflow(tmp_path, monkeypatch):
    known = small_mnist(5)
    prepare_mnist(tmp_path, known)
    loaded = data.load(config(dataset_name="mnist", data_dir=str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    by_default = data.load(config(dataset_name="mnist"))
    assert loaded.fingerprint == by_default.fingerprint
    parts = {"train": data.arrays(loaded.train), "test": data.arrays(loaded.heldout)}
    for split, found in parts.items():  # TFDS shuffles what it writes
        images = known[f"{split}_images"].reshape(5, -1)
        expected = rows_sorted(np.c_[images, known[f"{split}_labels"]])
        np.testing.assert_array_equal(
            rows_sorted(np.c_[found["x"].reshape(5, -1), found["label"]]), expected
        )


def test_mnist_as_tfrecord_needs_converting(tmp_path):
    prepare_mnist(tmp_path, small_mnist(2))
    info = tmp_path / "mnist" / "3.0.1" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    keys = {"dataset_name": "mnist", "data_dir": str(tmp_path)}
    assert_one_line(lambda: data.load(config(**keys)), "python scripts/convert_tfds.py --folder=")


def prepare_mnist(folder, arrays: dict[str, np.ndarray]) -> None:
    """Writes `arrays` as array_record, with the features of TFDS's own MNIST."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    image = tfds.features.Image(shape=(28, 28, 1), dtype=np.uint8, encoding_format="png")
    label = tfds.features.ClassLabel(num_classes=10)

    class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.1")
        __module__ = "mnist"  # of a package's module TFDS asks for importlib_resources

        def _info(self):
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {split: self._generate_examples(split) for split in ("train", "test")}

        def _generate_examples(self, split):
            pairs = zip(arrays[f"{split}_images"], arrays[f"{split}_labels"], strict=True)
            for i, (x, y) in enumerate(pairs):  # encoded: encoding an array needs TensorFlow
                yield i, {"image": io.BytesIO(encode(x)), "label": int(y)}

    Mnist(data_dir=folder, file_format="array_record").download_and_prepare()


def test_the_real_mnist(shared):
    file = shared / "data" / "mnist.npz"
    if not file.exists():
        pytest.skip("no ../shared/data/mnist.npz")
    mnist = data.load(config(dataset_name="mnist", data_dir=str(file)))
    assert (len(mnist.train), len(mnist.heldout)) == (60_000, 10_000)
    labels = data.arrays(mnist.train)["label"]
    np.testing.assert_array_equal(labels[:10], [5, 0, 4, 1, 9, 2, 1, 3, 1, 4])


# Pictures in folders and zips.


def encode(x: np.ndarray, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(x).save(file, kind)
    return file.getvalue()


def picture(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def write(place, files: dict[str, bytes]) -> str:
    """Writes a folder, or a .zip where the name of the place ends so."""
    if place.suffix == ".zip":
        with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return str(place)
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return str(place)


def flat(n: int, side: int = 6) -> dict[str, bytes]:
    return {f"{i:04}.png": encode(picture(i, side, side, 3)) for i in range(n)}


def folder(place, files, **keys) -> data.Dataset:
    return data.load(config(**{"dataset_name": "folder", "data_dir": write(place, files)} | keys))


def names(source: PictureSource) -> list[str]:
    return [source.pictures.name(index) for index in source.indices]


def test_class_folders_give_labels_and_a_zip_is_the_same_as_its_folder(tmp_path):
    x = {f"{c}/{i}.png": picture(i, 6, 6, 3) for c in ("b", "a", "c") for i in range(20)}
    files = {name: encode(value) for name, value in x.items()}
    zipped = {f"top/{name}": content for name, content in reversed(files.items())}
    sets = [folder(tmp_path / "tree", files), folder(tmp_path / "tree.zip", zipped)]
    assert sets[0].fingerprint == sets[1].fingerprint and sets[0].num_classes == 3
    for part in ("train", "heldout"):
        one, other = (data.arrays(getattr(s, part)) for s in sets)
        np.testing.assert_array_equal(one["x"], other["x"])
        np.testing.assert_array_equal(one["label"], other["label"])
    for i, name in enumerate(names(sets[0].train)):
        item = sets[0].train[i]
        np.testing.assert_array_equal(item["x"], x[name])
        assert item["label"] == "abc".index(name[0])


def test_a_flat_folder_has_no_labels_and_only_pictures_count(tmp_path):
    others = ["._0.png", "notes.txt", ".cache/1.png", "__MACOSX/2.png", "UPPER.PNG"]
    files = flat(3) | dict.fromkeys(others, encode(picture(9, 6, 6, 3)))
    for place in (tmp_path / "tree", tmp_path / "tree.zip"):
        dataset = folder(place, files, holdout=0.0)
        assert names(dataset.train) == ["0000.png", "0001.png", "0002.png", "UPPER.PNG"]
        assert dataset.num_classes == 0 and not data.arrays(dataset.train)["label"].any()


def test_new_pictures_move_no_old_one_between_the_parts(tmp_path):
    before = folder(tmp_path / "tree", flat(200))
    after = folder(tmp_path / "tree", flat(400))
    assert set(names(before.train)) < set(names(after.train))
    assert set(names(before.heldout)) < set(names(after.heldout))
    assert not set(names(after.train)) & set(names(after.heldout))
    assert len(after.train) + len(after.heldout) == 400
    assert 20 <= len(after.heldout) <= 60  # ± 3.3 standard deviations
    assert before.fingerprint != after.fingerprint


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_greyscale_files_become_rgb(tmp_path, kind):
    grey = np.full((6, 6), 77, np.uint8)
    files = {"0.png": encode(picture(0, 6, 6, 3)), f"1.{kind}": encode(grey, kind)}
    x = data.arrays(folder(tmp_path / "tree", files, holdout=0.0).train)["x"]
    assert x.shape == (2, 6, 6, 3) and np.all(x[1] == 77)


def test_image_size_is_that_of_the_first_picture_or_asked_for(tmp_path):
    files = flat(1) | {"z.png": encode(picture(1, 9, 12, 3))}
    assert folder(tmp_path / "tree", files).shape == (6, 6, 3)
    both = folder(tmp_path / "tree", files, image_size=4, holdout=0.0)
    assert data.arrays(both.train)["x"].shape == (2, 4, 4, 3)
    oblong = write(tmp_path / "oblong", {"a.png": encode(picture(1, 9, 12, 3))})
    assert_one_line(
        lambda: data.load(config(dataset_name="folder", data_dir=oblong)), "--image_size"
    )


@pytest.mark.parametrize("place", ["tree", "tree.zip"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no picture",
        encode(picture(0, 64, 64, 3))[:900],
        encode(picture(0, 64, 64, 3), "jpeg")[:-200],
    ],
)
def test_a_corrupt_picture_is_named(tmp_path, place, content):
    dataset = folder(tmp_path / place, flat(2) | {"bad.png": content}, holdout=0.0)
    assert_one_line(lambda: data.arrays(dataset.train), "bad.png", CorruptPicture)
    assert_one_line(lambda: take(1, dataset.train, batch_size=8, seed=0), "bad.png")


def test_a_zip_is_read_by_many_threads(tmp_path):
    source = folder(tmp_path / "tree.zip", flat(200), holdout=0.0).train
    one_by_one = np.stack([source[i]["x"] for i in range(200)])
    streams = [data.batches(source, batch_size=50, seed=s, shard=(s, 2)) for s in (0, 1)]
    for _ in range(8):
        for batch in map(next, streams):
            names = np.array([np.all(one_by_one == x, axis=(1, 2, 3)).sum() for x in batch["x"]])
            assert np.all(names == 1)
    np.testing.assert_array_equal(source.gather(range(200))["x"], one_by_one)


def test_centre_crop_halves_by_averaging_and_cuts_the_middle():
    """8 × 4 pixels to 2 × 2: blocks of 2 × 2 are averaged, then columns 1 and 2 of 4 remain."""
    blocks = np.arange(8, dtype=np.uint8).reshape(2, 4) * 10 + 4
    noise = np.array([[-3, 3], [2, -2]])
    x = (np.kron(blocks, np.ones((2, 2))) + np.tile(noise, (2, 4))).astype(np.uint8)
    np.testing.assert_array_equal(centre_crop(Image.fromarray(x), 2), [[14, 24], [54, 64]])


def test_centre_crop_resizes_bicubically():
    """5 × 7 pixels to a short side of 4: 4 × 6 by Keys's kernel, then columns 1 to 4."""
    x = picture(0, 5, 7)
    rows, columns = bicubic(5, 4), bicubic(7, 6)
    expected = np.clip(rows @ x @ columns.T, 0, 255)[:, 1:5]
    found = np.asarray(centre_crop(Image.fromarray(x), 4), float)
    np.testing.assert_allclose(found, expected, atol=2)  # rounded to whole levels twice


def bicubic(n: int, m: int) -> np.ndarray:
    """The (m, n) matrix that resamples n pixels to m < n, widened against aliasing (a = -1/2)."""
    scale = n / m
    d = np.abs((np.arange(m)[:, None] + 0.5) * scale - np.arange(n) - 0.5) / scale
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    weights = np.where(d < 1, near, np.where(d < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def test_imagenet_folders_are_class_indices_or_sorted_wnids(tmp_path):
    content = encode(picture(0, 256, 256, 3))
    by_number = {f"{c:03}/{i}.png": content for c in (5, 995) for i in range(3)}
    dataset = folder(tmp_path / "a", by_number, dataset_name="imagenet256", holdout=0.0)
    assert (dataset.num_classes, dataset.shape) == (1000, (256, 256, 3))
    assert list(data.arrays(dataset.train)["label"]) == [5, 5, 5, 995, 995, 995]
    by_wnid = {f"{c}/{c}_1.png": content for c in ("n02", "n01", "n07")}
    dataset = folder(tmp_path / "b", by_wnid, dataset_name="imagenet256", holdout=0.0)
    assert dataset.num_classes == 3 and list(data.arrays(dataset.train)["label"]) == [0, 1, 2]


def test_celebahq_has_no_labels(tmp_path):
    content = encode(picture(0, 256, 256, 3))
    files = {f"{c}/{i}.png": content for c in ("female", "male") for i in range(2)}
    dataset = folder(tmp_path / "a", files, dataset_name="celebahq256", holdout=0.0)
    assert dataset.num_classes == 0 and not data.arrays(dataset.train)["label"].any()


@pytest.mark.parametrize(
    "name, file, n, classes, side",
    [
        ("folder", "tiny_imagenet_10x300_64.zip", 3000, 10, 64),
        ("imagenet256", "imagenet_sample_200_256.zip", 200, 1000, 256),
        ("celebahq256", "omi_faces_400_256.zip", 400, 0, 256),
    ],
)
def test_real_pictures(shared, name, file, n, classes, side):
    place = shared / "data" / file
    if not place.exists():
        pytest.skip(f"no ../shared/data/{file}")
    dataset = data.load(config(dataset_name=name, data_dir=str(place)))
    assert len(dataset.train) + len(dataset.heldout) == n
    assert (dataset.num_classes, dataset.shape) == (classes, (side, side, 3))
    batch = take(1, dataset.train, batch_size=32, seed=0, flip=True)[0]
    assert batch["x"].shape == (32, side, side, 3) and 60 < batch["x"].mean() < 180
    assert np.all(batch["label"] < max(1, classes))


# What is missing, and how to mend it.


@pytest.mark.parametrize(
    "keys, mend",
    [
        ({"dataset_name": "digit"}, "digits"),
        ({"dataset_name": "xyz"}, "checkerboard"),
        ({"dataset_name": "digits", "holdout": 1.0}, "--holdout"),
        ({"dataset_name": "digits", "image_size": 32}, "--image_size=8"),
        ({"dataset_name": "spirals", "image_size": 32}, "--image_size=0"),
        ({"dataset_name": "mnist"}, "--data_dir"),
        ({"dataset_name": "mnist", "data_dir": "nowhere"}, "--data_dir"),
        ({"dataset_name": "mnist", "data_dir": "text.npz"}, "text.npz"),
        ({"dataset_name": "mnist", "data_dir": "other.npz"}, "train_images"),
        ({"dataset_name": "folder"}, "--data_dir"),
        ({"dataset_name": "imagenet256"}, "--data_dir"),
        ({"dataset_name": "folder", "data_dir": "nowhere"}, "--data_dir"),
        ({"dataset_name": "folder", "data_dir": "empty"}, "no pictures"),
        ({"dataset_name": "folder", "data_dir": "text.npz"}, "text.npz"),
        ({"dataset_name": "folder", "data_dir": "mixed"}, "loose.png"),
        ({"dataset_name": "folder", "data_dir": "splits"}, "train and val"),
        ({"dataset_name": "imagenet256", "use_stable_vae": 1}, "--use_stable_vae=0"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_line(tmp_path, monkeypatch, keys, mend):
    content = encode(picture(0, 4, 4, 3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    write(tmp_path / "mixed", {"loose.png": content, "a/0.png": content})
    write(tmp_path / "splits", {"train/a/0.png": content, "val/a/1.png": content})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no_tfds"))
    assert_one_line(lambda: data.load(config(**keys)), mend)


def test_a_link_to_a_folder_is_followed(tmp_path):
    write(tmp_path / "real", flat(2))
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").symlink_to(tmp_path / "real")
    found = data.open_pictures(str(tmp_path / "tree"))
    assert {found.name(i) for i in range(len(found.keys))} == {"a/0000.png", "a/0001.png"}


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_grey_of_sixteen_bits_is_scaled_and_not_cut_off(kind):
    ramp = np.arange(0, 65536, 256, np.uint16).reshape(16, 16)
    picture = np.asarray(decode(encoded(Image.fromarray(ramp), kind), "ramp"))
    expected = np.rint(ramp / 65535 * 255)
    np.testing.assert_array_equal(picture, np.repeat(expected[..., None], 3, axis=-1))


def test_other_kinds_are_refused_by_name():
    values = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    with pytest.raises(CorruptPicture, match=r"depth.tiff .* floating-point"):
        decode(encoded(Image.fromarray(values), "tiff"), "depth.tiff")
    with pytest.raises(CorruptPicture, match=r"line.png .* 900 × 2 pixels have no centre"):
        decode(encoded(Image.new("RGB", (900, 2)), "png"), "line.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "RGB"])
def test_every_usual_mode_becomes_rgb(mode):
    picture = Image.new("RGB", (4, 4), (250, 10, 20)).convert(mode)
    kind = "tiff" if mode == "CMYK" else "png"
    assert decode(encoded(picture, kind), "picture").mode == "RGB"
