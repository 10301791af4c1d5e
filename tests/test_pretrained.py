"""The networks that come with the repository: small, and good enough to look at."""

import pathlib

import numpy as np
import pytest

from pipelines.flow import FlowPipeline
from utils import data, distances

FOLDER = pathlib.Path(__file__).parents[1] / "pretrained"


def test_they_are_under_five_megabytes():
    assert 0 < sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) < 5e6


@pytest.mark.parametrize("name", ["digits_flow_matching", "digits_mean_flow"])
def test_they_draw_digits(name):
    """As near to training pictures as the held-out split is; MeanFlow in one step."""
    pipeline = FlowPipeline.from_pretrained(FOLDER / name)
    dataset = data.load(pipeline.config)
    assert pipeline.card["dataset"] == f"{dataset.name} {dataset.fingerprint}"
    train, held = data.arrays(dataset.train)["x"], data.arrays(dataset.heldout)["x"]
    steps = 1 if name.endswith("mean_flow") else 16
    pictures = pipeline(np.arange(100) % 10, steps=steps)
    near, held_near = (distances.nearest_distances(x, train).mean() for x in (pictures, held))
    assert near < 1.25 * held_near
    noise = np.random.default_rng(0).integers(0, 256, pictures.shape, dtype=np.uint8)
    assert distances.nearest_distances(noise, train).mean() > 2 * held_near


@pytest.mark.parametrize("name", ["digits_flow_matching", "digits_mean_flow"])
def test_the_command_that_trained_them_is_named(name):
    assert "python train_" in (FOLDER / name / "README.md").read_text()
