"""Curves of training, and when a run was first at a level."""

import json

import pytest
from PIL import Image

from pipelines import curves
from utils.cli import UserError


def run(folder, values, before=None):
    """A run that logged a distance, with half a line at the end, as a kill leaves it."""
    folder.mkdir()
    card = {"flops_per_step": 10.0} | ({"initialised_from": before} if before else {})
    (folder / "card.json").write_text(json.dumps(card))
    lines = [{"step": step, "loss": 1.0, "error": 1 / step} for step in (1, 2, 3, 4)]
    lines += [{"step": step, "fid_quick_100/1_step": value} for step, value in values]
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text(text + '\n{"step": 5, "lo')
    return str(folder)


@pytest.fixture
def both(tmp_path):
    first = run(tmp_path / "first", [(2, 30.0), (4, 9.0)])
    before = {"path": "x", "train_steps": 100, "train_flops": 5000.0}
    # Step 2 was done again after a restart: what was logged last counts.
    second = run(tmp_path / "second", [(2, 1.0), (2, 20.0), (4, float("nan"))], before)
    return first, second


def test_when_levels_are_reached_and_with_what_was_before(both, tmp_path):
    options = curves.Options(both, ("fid_quick",), (30.0, 20.0, 8.0), str(tmp_path / "c.png"))
    rows = [line.strip("| ").split(" | ") for line in curves.draw(options).splitlines()]
    assert rows[0] == ["first `fid_quick_100/1_step` of at most", "first", "second"]
    assert rows[2] == [
        *("30", "step 2, 20 FLOPs"),
        "step 2, 20 FLOPs (102, 5e+03 with what it began from)",
    ]
    assert rows[3][1:2] == ["step 4, 40 FLOPs"] and rows[3][2].startswith("step 2")
    assert rows[4][1:] == ["not reached", "not reached"]
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width > 300


def test_by_default_losses_and_distances_are_drawn(both, tmp_path):
    logs = [curves.read(folder) for folder in both]
    assert curves.chosen(logs, ("loss", "fid")) == ["loss", "fid_quick_100/1_step"]
    assert curves.chosen(logs, ()) == ["loss", "error", "fid_quick_100/1_step"]
    assert curves.draw(curves.Options(both, out=str(tmp_path / "c.png"))) == ""


@pytest.mark.parametrize(
    ("metrics", "told"), [(("fd",), "the runs logged loss, error"), (("step",), "--metrics=step")]
)
def test_a_metric_that_no_run_logged(both, tmp_path, metrics, told):
    with pytest.raises(UserError, match=told):
        curves.draw(curves.Options(both, metrics, out=str(tmp_path / "c.png")))


def test_a_folder_without_a_log(tmp_path):
    folder = run(tmp_path / "run", [])
    (tmp_path / "run/metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        curves.draw(curves.Options((folder,), out=str(tmp_path / "c.png")))
    with pytest.raises(UserError, match="which runs"):
        curves.draw(curves.Options())
