"""Names of classes: ImageNet's are whole and in order, words mean what they say, data sets tell."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from configs import digits, folder
from tests.small import write_pictures
from utils import classes, data, shards
from utils.cli import UserError
from utils.pictures import open_pictures

NAMES, WORDS = classes.imagenet(), classes.imagenet_words()


def test_imagenets_names_are_a_thousand_different_ones():
    assert len(set(NAMES)) == 1000
    assert {i: NAMES[i] for i in (0, 207, 360, 999)} == {
        **{0: "tench", 207: "golden retriever"},
        **{360: "otter", 999: "toilet tissue"},
    }


def test_imagenets_order_is_that_of_tfds():
    """An independent list: the labels that TFDS gives to the folders of ImageNet's archive."""
    import tensorflow_datasets

    place = pathlib.Path(tensorflow_datasets.__file__).parent
    theirs = (place / "datasets" / "imagenet2012" / "labels.txt").read_text().split()
    assert classes.readable(theirs) == NAMES
    assert len(theirs) == 1000


@pytest.mark.parametrize(
    ("word", "label"),
    [
        ("207", 207),
        ("golden retriever", 207),
        ("Golden_Retriever", 207),
        ("polar bear", 296),  # no class's first word
        ("Cardigan", 264),  # a dog
        ("cardigan", 474),
        ("three-toed sloth", 364),
        ("crane (bird)", 134),
        ("maillot", 638),
    ],
)
def test_a_word_means_a_class(word, label):
    assert classes.find(word, NAMES, WORDS) == label


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("1000", "no class 1000: there are 0 to 999"),
        ("golden retreiver", r"did you mean golden retriever \(207\)\?"),
        ("retriever", r"there are flat-coated retriever \(205\), curly-coated"),
        ("crane", r"crane \(bird\) \(134\), crane \(machine\) \(517\): give the number"),
        ("CARDIGAN", r"Cardigan \(264\), cardigan \(474\): give the number"),
        ("zzzz", r"there are tench \(0\), .* and 994 more"),
    ],
)
def test_a_word_that_means_no_class_is_told(word, told):
    with pytest.raises(UserError, match=told):
        classes.find(word, NAMES, WORDS)


def test_a_data_set_tells_its_classes(tmp_path):
    write_pictures(tmp_path / "pictures", 6)
    config = folder.get_config()
    config.update({"data_dir": str(tmp_path / "pictures"), "image_size": 16})
    assert data.load(config).classes == ("a", "b", "c")
    assert data.load(digits.get_config()).classes == tuple("0123456789")


def test_folders_of_imagenet_are_told_as_names(tmp_path):
    for name in ("n02099601", "n01440764"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name / "a.png")
    opened = open_pictures(str(tmp_path), dataset_name="imagenet256")
    assert opened.classes == ("tench", "golden retriever")


def test_a_card_with_other_classes_than_it_counts_is_refused(tmp_path):
    from tests.test_shards import write

    card = write(tmp_path)
    assert shards.read_card(tmp_path).classes == ()
    fields = vars(card) | {"classes": ("a", "b")}
    shards.write_card(tmp_path, shards.Card(**fields))
    with pytest.raises(UserError, match="its classes cannot be"):
        shards.read_card(tmp_path)
    shards.write_card(tmp_path, shards.Card(**fields | {"classes": tuple("abcde")}))
    assert shards.read_card(tmp_path).classes == tuple("abcde")
