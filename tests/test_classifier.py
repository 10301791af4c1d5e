"""The classifier behind fd_classifier: its shapes, its training, its cache."""

import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from models.classifier import FEATURES, Classifier
from pipelines import classifier
from pipelines.classifier import Recipe
from pipelines.extractors import Extractor
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
def trained(digits, cache) -> Extractor:
    return classifier.extractor(digits, cache, QUICK)


def features_of(extractor: Extractor, pictures) -> np.ndarray:
    return np.asarray(extractor.apply(pictures)["pool"])


def never(*_):
    raise AssertionError("trained again")


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (64, 64, 3), (70, 40, 3), (1, 1, 1)])
def test_the_classifier_takes_pictures_of_any_size(shape):
    pictures = jax.ShapeDtypeStruct((3, *shape), np.uint8)
    init = Classifier(num_classes=5).init_with_output
    (found, logits), _ = jax.eval_shape(init, jax.random.key(0), pictures)
    assert (found.shape, found.dtype) == ((3, FEATURES), np.float32)
    assert (logits.shape, logits.dtype) == ((3, 5), np.float32)


def test_features_have_one_scale(trained, digits):
    pictures = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), np.uint8)
    found = features_of(trained, pictures)
    np.testing.assert_allclose(found.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(found.var(axis=1), 1, rtol=1e-3)
    real = FeatureStats.of(features_of(trained, data.arrays(digits.train)["x"]))
    assert np.trace(real.cov) < FEATURES


def accuracy(extractor: Extractor) -> float:
    return float(re.search(r"accuracy (0\.\d+|1\.0+)", extractor.words)[1])


def test_the_classifier_learns_and_says_how_well(trained):
    assert trained.name == "classifier"
    assert accuracy(trained) > 0.8  # chance: 0.1
    assert "not FID" in trained.words


def test_a_second_call_trains_nothing(trained, digits, cache, monkeypatch):
    monkeypatch.setattr(classifier, "_train", never)
    again = classifier.extractor(digits, cache, QUICK)
    assert (again.words, again.fingerprint) == (trained.words, trained.fingerprint)
    same_bits(again, trained, digits)


def same_bits(a: Extractor, b: Extractor, dataset: data.Dataset) -> None:
    pictures = data.arrays(dataset.heldout)["x"]
    np.testing.assert_array_equal(features_of(a, pictures), features_of(b, pictures))


def test_the_same_seed_gives_the_same_bits(trained, digits, tmp_path):
    same_bits(classifier.extractor(digits, tmp_path, QUICK), trained, digits)


def test_another_seed_recipe_or_data_set_is_trained_anew(digits, cache, trained, monkeypatch):
    monkeypatch.setattr(classifier, "_train", never)
    with pytest.raises(AssertionError, match="trained again"):
        classifier.extractor(digits, cache, QUICK._replace(seed=1))
    with pytest.raises(AssertionError, match="trained again"):
        classifier.extractor(digits, cache, QUICK._replace(steps=9))
    with pytest.raises(AssertionError, match="trained again"):
        classifier.extractor(digits._replace(fingerprint="other"), cache, QUICK)


@pytest.mark.parametrize("harm", ["empty", "cut", "noise", "other"])
def test_a_damaged_cache_is_told_in_one_line_and_computed_again(
    harm, digits, trained, tmp_path, capsys
):
    quick = QUICK._replace(steps=2)
    first = classifier.extractor(digits, tmp_path, quick)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    harmed = {"empty": b"", "cut": whole[: len(whole) // 2], "noise": whole[::-1]}
    if harm == "other":
        with file.open("wb") as out:
            np.savez(out, accuracy=1.0)
    else:
        file.write_bytes(harmed[harm])
    capsys.readouterr()
    again = classifier.extractor(digits, tmp_path, quick)
    told = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(told) == 1
    assert str(file) in told[0]
    same_bits(again, first, digits)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert classifier._load(file) is not None


def test_without_labels_it_tells_rotations(digits, tmp_path):
    unlabelled = digits._replace(num_classes=0)
    trained = classifier.extractor(unlabelled, tmp_path, QUICK)
    assert trained.name == "rotation_classifier"
    assert accuracy(trained) > 0.4  # chance: 0.25


def test_rotations_are_quarter_turns_and_their_number():
    x = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 1), np.uint8)
    turned, labels = classifier._rotations({"x": x})
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    np.testing.assert_array_equal(turned[:2], x)
    np.testing.assert_array_equal(turned[3], np.rot90(x[1]))


def test_rotations_need_square_pictures(digits, tmp_path):
    with pytest.raises(UserError, match="square"):
        classifier.extractor(digits._replace(num_classes=0, shape=(8, 6, 1)), tmp_path, QUICK)


def test_without_a_held_out_split_no_accuracy_is_claimed(digits, tmp_path):
    none = digits.heldout.gather([])
    empty = digits._replace(heldout=type(digits.heldout)(none["x"], none["label"]))
    trained = classifier.extractor(empty, tmp_path, QUICK._replace(steps=1))
    assert "no held-out split" in trained.words


def test_shifts_move_by_an_eighth_at_most_and_repeat_edges():
    picture = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    padded = np.pad(picture, ((2, 2), (2, 2), (0, 0)), mode="edge")
    allowed = [padded[i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
    shifted = jax.vmap(lambda key: classifier._shifted(key, picture, 1 / 8))(
        jax.random.split(jax.random.key(0), 200)
    )
    places = {
        next(i for i, a in enumerate(allowed) if np.array_equal(a, s)) for s in np.asarray(shifted)
    }
    assert len(places) == 25  # every shift occurs, and no other
