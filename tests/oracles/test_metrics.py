"""Our metrics against torch-fidelity's on the same features: `make oracles` runs this."""

import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch

from tests.oracles import fidelity
from utils import fid
from utils.fid import FeatureStats, ScoreSums

# Names that the metrics' modules import from one that needs torchvision; none is called here.
NOT_CALLED = (
    "cache_lookup_one_recompute_on_miss",
    "create_feature_extractor",
    "extract_featuresdict_from_input_id_cached",
    "get_cacheable_input_name",
    "resolve_feature_extractor",
    "resolve_feature_layer_for_metric",
)


@pytest.fixture(scope="module")
def theirs():
    with mock.patch.dict(sys.modules):
        fidelity.module("helpers")
        utils = types.ModuleType("torch_fidelity.utils")
        utils.__dict__.update(dict.fromkeys(NOT_CALLED))
        sys.modules["torch_fidelity.utils"] = utils
        yield {name: fidelity.module(f"metric_{name}") for name in ("fid", "isc", "kid", "prc")}


def sides(n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples and real features: above 0 and unevenly spread, as those after a ReLU."""
    rng = np.random.default_rng((n, m, d))
    spread = np.exp(-np.linspace(0, 5, d))
    x, y = (np.abs(rng.normal(a, 1, size=(k, d))) * spread for k, a in ((n, 1.0), (m, 0.2)))
    return x.astype(np.float32), y.astype(np.float32)


@pytest.mark.parametrize(("n", "m"), [(900, 1100), (60, 1000)])  # above and below the dimension
def test_frechet_distance(theirs, n, m):
    x, y = sides(n, m, 128)
    found = [theirs["fid"].fid_features_to_statistics(torch.tensor(a).double()) for a in (x, y)]
    expected = theirs["fid"].fid_statistics_to_metric(*found, False)
    distance = fid.frechet_distance(FeatureStats.of(x), FeatureStats.of(y))
    assert distance == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)


def test_inception_score(theirs):
    logits = np.random.default_rng(0).normal(0, 2, size=(1037, 50)).astype(np.float32)
    expected = theirs["isc"].isc_features_to_metric(torch.tensor(logits), shuffle=False)
    sums = ScoreSums.empty(len(logits), logits.shape[1])
    for start in range(0, len(logits), 64):
        sums = sums.update(logits[start : start + 64], start)
    assert fid.inception_score(sums) == pytest.approx(tuple(expected.values()), rel=1e-9)


def test_kernel_distance(theirs, monkeypatch):
    random = types.SimpleNamespace(RandomState=np.random.default_rng)  # the same subsets as ours
    theirs_np = types.SimpleNamespace(**vars(np) | {"random": random})
    monkeypatch.setattr(theirs["kid"], "np", theirs_np)
    x, y = sides(300, 250, 64)
    options = {"kid_subsets": 20, "kid_subset_size": 100, "rng_seed": 3, "verbose": False}
    tensors = (torch.tensor(side).double() for side in (x, y))
    expected = theirs["kid"].kid_features_to_metric(*tensors, **options)
    found = fid.kernel_distance(x, y, subsets=20, size=100, seed=3)
    assert found == pytest.approx(tuple(expected.values()), rel=1e-9)


@pytest.mark.parametrize("neighbours", [3, 5])
def test_precision_and_recall(theirs, neighbours):
    x, y = sides(700, 900, 16)
    options = {"prc_neighborhood": neighbours, "prc_batch_size": 256, "save_cpu_ram": True}
    tensors = (torch.tensor(side).double() for side in (x, y))
    expected = theirs["prc"].prc_features_to_metric(*tensors, verbose=False, **options)
    precision, recall = fid.precision_recall(x, y, neighbours)
    assert 0.1 < min(precision, recall) < 0.9
    # A few pairs may lie within rounding of a radius.
    assert (precision, recall) == pytest.approx(
        (expected["precision"], expected["recall"]), abs=2 / 700
    )
