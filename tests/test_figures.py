"""Grids put each picture where it belongs; figures show what they were given."""

import numpy as np
import pytest
from PIL import Image

from utils import figures
from utils.figures import Curve, Panel, Tile, grid, save_curves, save_grid, save_mosaic, save_png

BLUE = (31, 119, 180)  # matplotlib's first colour
ORANGE = (255, 127, 14)  # and its second


def flat(*levels: int, size: int = 60, channels: int = 1) -> np.ndarray:
    """Pictures of one grey level each."""
    return np.stack([np.full((size, size, channels), level, np.uint8) for level in levels])


def share(path, colour) -> float:
    """The share of pixels that have about this colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return float(np.mean(np.abs(pixels - colour).max(-1) < 12))


def test_grid_lays_pictures_out_row_by_row_on_white():
    sheet = grid(flat(10, 20, 30, 40, 50), columns=3)
    step = 60 + figures.GAP
    assert sheet.shape == (2 * step + figures.GAP, 3 * step + figures.GAP, 1)
    centres = [[int(sheet[32 + r * step, 32 + c * step, 0]) for c in range(3)] for r in range(2)]
    assert centres == [[10, 20, 30], [40, 50, 255]]
    assert np.all(sheet[:2] == 255)
    assert np.all(sheet[:, -2:] == 255)


def test_tiny_pictures_are_enlarged_by_a_whole_factor():
    digit = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), np.uint8)
    sheet = grid(digit)[2:-2, 2:-2]
    assert sheet.shape == (48, 48, 1)
    np.testing.assert_array_equal(sheet[::6, ::6], digit[0])


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (5, 3), (9, 3), (10, 4)])
def test_grid_is_as_square_as_it_can_be(n, columns):
    assert grid(flat(*range(n))).shape[1] == columns * 62 + 2


def test_points_become_a_picture_with_dots():
    sheet = grid(np.random.default_rng(1).normal(size=(500, 2)).astype(np.float32))
    assert sheet.dtype == np.uint8
    assert sheet.shape[2] == 3
    assert 0.001 < np.mean(sheet.min(-1) < 200) < 0.5


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 8, 8, 1)), np.zeros((2, 8, 8), np.uint8), np.zeros((0, 8, 8, 1), np.uint8)],
)
def test_grid_refuses_what_is_no_pictures(images):
    with pytest.raises(ValueError, match="a grid needs"):
        grid(images)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_same_values(tmp_path, channels):
    image = np.random.default_rng(2).integers(0, 256, (9, 7, channels), np.uint8)
    save_png(tmp_path / "new" / "a.png", image)
    read = np.asarray(Image.open(tmp_path / "new" / "a.png"))
    np.testing.assert_array_equal(read.reshape(image.shape), image)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]  # nothing half done


def test_save_grid_writes_the_grid(tmp_path):
    save_grid(tmp_path / "a.png", flat(0, 90, 180), columns=2)
    read = np.asarray(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(read, grid(flat(0, 90, 180), 2)[..., 0])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_panel_shows_its_curves(tmp_path, count):
    curves = [Curve("flow matching", [1, 2, 32], [6, 3, 0.2]), Curve("MeanFlow", [1, 4], [1, 0.5])]
    save_curves(tmp_path / "both.png", [Panel("digits", curves, {"real": 0.1})] * count, "fd")
    save_curves(tmp_path / "none.png", [Panel("digits", [], {"real": 0.1})] * count, "fd")
    assert share(tmp_path / "both.png", BLUE) > 0.001
    assert share(tmp_path / "both.png", ORANGE) > 0.001
    assert share(tmp_path / "none.png", BLUE) == 0


def test_a_label_has_one_colour_in_all_panels(tmp_path):
    first, second = Curve("a", [1, 32], [6.0, 0.2]), Curve("b", [1, 32], [3.0, 0.1])
    save_curves(tmp_path / "x.png", [Panel("", [first, second], {}), Panel("", [second], {})], "")
    save_curves(tmp_path / "y.png", [Panel("", [first, second], {}), Panel("", [first], {})], "")
    assert share(tmp_path / "x.png", ORANGE) > 1.3 * share(tmp_path / "x.png", BLUE)
    assert share(tmp_path / "y.png", BLUE) > 1.3 * share(tmp_path / "y.png", ORANGE)


def test_mosaic_shows_pictures_and_points(tmp_path):
    tile = Tile("1 step", np.full((50, 50, 3), BLUE, np.uint8), "fd 1")
    save_mosaic(tmp_path / "pictures.png", [[tile, tile], [tile]], ["a", "b"])
    assert share(tmp_path / "pictures.png", BLUE) > 0.3
    points = np.random.default_rng(3).normal(size=(3000, 2))
    save_mosaic(tmp_path / "points.png", [[Tile("target", points), Tile("1 step", points / 2)]])
    dark = np.asarray(Image.open(tmp_path / "points.png").convert("L")) < 200
    assert dark.mean() > 0.02


def test_points_share_the_limits_of_the_first_tile():
    points = np.array([[0.0, 0.0], [2.0, 1.0]])
    (left, right), (low, high) = figures._limits(points)
    assert right - left == pytest.approx(high - low)
    assert left < 0
    assert right > 2


# Words above pictures.


def test_labelled_pictures_stand_under_their_words():
    images = flat(10, 20, 30, 40, size=100)
    sheet = figures.labelled(images, ["one", "two", "", "four"], 2)[..., 0]
    bare = figures.labelled(images, [""] * 4, 2)[..., 0]
    assert bare.shape[0] < sheet.shape[0]
    columns = [2 * figures.GAP + k * (100 + 2 * figures.GAP) for k in range(2)]
    row = (sheet.shape[0] - figures.GAP) // 2
    above = row - 100 - figures.GAP
    for i, level in enumerate((10, 20, 30, 40)):
        x, y = columns[i % 2], i // 2 * row + above
        assert np.all(sheet[y : y + 100, x : x + 100] == level)
        written = np.any(sheet[i // 2 * row : y, x : x + 100] < 128)
        assert written == (i != 2)


def test_words_that_do_not_fit_are_wrapped_and_cut():
    font = figures._font(12)
    assert figures._lines("7", 96, font) == ["7"]
    assert figures._lines("golden retriever", 96, font) == ["golden", "retriever"]
    first, second = figures._lines("soft-coated wheaten terrier of somewhere else", 96, font)
    assert second.endswith("…")
    assert max(font.getlength(line) for line in (first, second)) <= 96
    assert figures._lines("A" * 50, 96, font)[0].endswith("…")


def test_heads_stand_above_columns():
    images = flat(10, 20, size=100)
    with_heads = figures.labelled(images, ["a", "b"], 2, ["1 step", "4 steps"])
    without = figures.labelled(images, ["a", "b"], 2)
    more = len(with_heads) - len(without)
    np.testing.assert_array_equal(with_heads[more:], without)
    assert np.any(with_heads[:more] < 128)


@pytest.mark.parametrize(("words", "heads"), [(["a"], []), (["a", "b"], ["1 step"])])
def test_another_number_of_words_is_refused(words, heads):
    with pytest.raises(ValueError, match="need as many words"):
        figures.labelled(flat(1, 2), words, 2, heads)


def test_a_png_says_what_it_was_told(tmp_path):
    text = {"label": "207", "class": "größer 犬", "command": "python sample.py --labels=207"}
    save_png(tmp_path / "a.png", flat(7)[0], text)
    assert figures.read_text(tmp_path / "a.png") == text
    assert figures.read_text(tmp_path / "a.png") == Image.open(tmp_path / "a.png").text
