"""The classifier behind fd_classifier: its shapes, its training, its cache."""

import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from models.classifier import FEATURES, Classifier
from pipelines import features
from pipelines.features import Recipe
from utils import data
from utils.cli import UserError
from utils.fid import FeatureStats

QUICK = Recipe(steps=150, batch_size=64)


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    keys = {"dataset_name": "digits", "holdout": 0.1, "use_stable_vae": 0, "image_size": 0}
    return data.load(ConfigDict(keys | {"data_dir": ""}))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def reference(digits, cache) -> features.Reference:
    return features.prepare(digits, cache, QUICK)


def never(*_):
    raise AssertionError("trained again")


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (64, 64, 3), (70, 40, 3), (1, 1, 1)])
def test_the_classifier_takes_pictures_of_any_size(shape):
    pictures = jax.ShapeDtypeStruct((3, *shape), np.uint8)
    init = Classifier(num_classes=5).init_with_output
    (found, logits), _ = jax.eval_shape(init, jax.random.key(0), pictures)
    assert (found.shape, found.dtype) == ((3, FEATURES), np.float32)
    assert (logits.shape, logits.dtype) == ((3, 5), np.float32)


def test_features_have_one_scale(reference):
    pictures = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), np.uint8)
    found = reference.extractor.apply(pictures)
    np.testing.assert_allclose(found.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(found.var(axis=1), 1, rtol=1e-3)
    assert np.trace(reference.stats.cov) < FEATURES


def accuracy(reference: features.Reference) -> float:
    return float(re.search(r"accuracy (0\.\d+|1\.0+)", reference.extractor.protocol)[1])


def test_the_classifier_learns_and_says_how_well(reference):
    assert reference.extractor.name == "fd_classifier"
    assert accuracy(reference) > 0.8  # chance: 0.1
    assert "not FID" in reference.extractor.protocol


def test_reference_is_of_the_whole_training_split(reference, digits):
    stats = FeatureStats.of(reference.extractor.apply(data.arrays(digits.train)["x"]))
    assert reference.stats.count == stats.count == len(digits.train)
    np.testing.assert_allclose(reference.stats.mean, stats.mean, atol=1e-5)
    np.testing.assert_allclose(reference.stats.cov, stats.cov, atol=1e-4)


def test_a_second_call_trains_nothing(reference, digits, cache, monkeypatch):
    monkeypatch.setattr(features, "_train", never)
    again = features.prepare(digits, cache, QUICK)
    pictures = data.arrays(digits.heldout)["x"]
    assert again.extractor.protocol == reference.extractor.protocol
    np.testing.assert_array_equal(again.stats.outer, reference.stats.outer)
    np.testing.assert_array_equal(
        again.extractor.apply(pictures), reference.extractor.apply(pictures)
    )


def test_the_same_seed_gives_the_same_bits(reference, digits, tmp_path):
    again = features.prepare(digits, tmp_path, QUICK)
    np.testing.assert_array_equal(again.stats.outer, reference.stats.outer)


def test_another_seed_recipe_or_data_set_is_trained_anew(digits, cache, reference, monkeypatch):
    monkeypatch.setattr(features, "_train", never)
    with pytest.raises(AssertionError, match="trained again"):
        features.prepare(digits, cache, QUICK._replace(seed=1))
    with pytest.raises(AssertionError, match="trained again"):
        features.prepare(digits, cache, QUICK._replace(steps=9))
    with pytest.raises(AssertionError, match="trained again"):
        features.prepare(digits._replace(fingerprint="other"), cache, QUICK)


@pytest.mark.parametrize("harm", ["empty", "cut", "noise", "other"])
def test_a_damaged_cache_is_told_in_one_line_and_computed_again(
    harm, digits, reference, tmp_path, capsys
):
    quick = QUICK._replace(steps=2)
    first = features.prepare(digits, tmp_path, quick)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    harmed = {"empty": b"", "cut": whole[: len(whole) // 2], "noise": whole[::-1]}
    if harm == "other":
        with file.open("wb") as out:
            np.savez(out, accuracy=1.0)
    else:
        file.write_bytes(harmed[harm])
    capsys.readouterr()
    again = features.prepare(digits, tmp_path, quick)
    told = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(told) == 1
    assert str(file) in told[0]
    np.testing.assert_array_equal(again.stats.outer, first.stats.outer)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert features._load(file) is not None


def test_without_labels_it_tells_rotations(digits, tmp_path):
    unlabelled = digits._replace(num_classes=0)
    reference = features.prepare(unlabelled, tmp_path, QUICK)
    assert reference.extractor.name == "fd_rotation_classifier"
    assert accuracy(reference) > 0.4  # chance: 0.25


def test_rotations_are_quarter_turns_and_their_number():
    x = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 1), np.uint8)
    turned, labels = features._rotations({"x": x})
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    np.testing.assert_array_equal(turned[:2], x)
    np.testing.assert_array_equal(turned[3], np.rot90(x[1]))


def test_rotations_need_square_pictures(digits, tmp_path):
    with pytest.raises(UserError, match="square"):
        features.prepare(digits._replace(num_classes=0, shape=(8, 6, 1)), tmp_path, QUICK)


def test_without_a_held_out_split_no_accuracy_is_claimed(digits, tmp_path):
    none = digits.heldout.gather([])
    empty = digits._replace(heldout=type(digits.heldout)(none["x"], none["label"]))
    reference = features.prepare(empty, tmp_path, QUICK._replace(steps=1))
    assert "no held-out split" in reference.extractor.protocol


def test_shifts_move_by_an_eighth_at_most_and_repeat_edges():
    picture = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    padded = np.pad(picture, ((2, 2), (2, 2), (0, 0)), mode="edge")
    allowed = [padded[i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
    shifted = jax.vmap(lambda key: features._shifted(key, picture, 1 / 8))(
        jax.random.split(jax.random.key(0), 200)
    )
    places = {
        next(i for i, a in enumerate(allowed) if np.array_equal(a, s)) for s in np.asarray(shifted)
    }
    assert len(places) == 25  # every shift occurs, and no other
