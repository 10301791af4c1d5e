"""One pass over features: the same sums whatever the batches, interruptions and restarts."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from utils import tally
from utils.cli import UserError
from utils.fid import FeatureStats, inception_score
from utils.tally import Tally

TOTAL, WIDTHS = 100, {"pool": 6, "spatial": 5, "logits": 4}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tally, "BLOCK", 16)


def made(seed: int = 0, total: int = TOTAL) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=(total, d)).astype(np.float32) for k, d in WIDTHS.items()}


def feed(t: Tally, features: dict[str, np.ndarray], stop: int = TOTAL, batch: int = 7) -> None:
    while t.count < stop:
        end = min(t.count + batch, stop)
        t.update({part: values[t.count : end] for part, values in features.items()})


def assert_same(a: Tally, b: Tally) -> None:
    """Bit by bit."""
    assert a.count == b.count
    assert a.stats.keys() == b.stats.keys()
    pairs = [(a.stats[k], b.stats[k]) for k in a.stats]
    pairs += [(a.scores, b.scores)] if a.scores else []
    for left, right in pairs:
        for x, y in zip(left, right, strict=True):
            np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(a.features, b.features)


def test_sums_and_features_are_those_of_all_pictures(tmp_path):
    features, t = made(), Tally.open(tmp_path / "t", TOTAL)
    feed(t, features)
    for part in ("pool", "spatial"):
        whole = FeatureStats.of(features[part])
        assert t.stats[part].count == TOTAL
        np.testing.assert_allclose(t.stats[part].mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(t.stats[part].cov, whole.cov, rtol=1e-10, atol=1e-12)
    assert t.scores.count.sum() == TOTAL
    assert inception_score(t.scores)[0] > 1
    np.testing.assert_array_equal(t.features, features["pool"])
    assert not t.features.flags.writeable
    np.testing.assert_array_equal(np.load(tmp_path / "t" / "features.npy"), features["pool"])


@pytest.mark.parametrize("batch", [1, 16, 33, 100])
def test_batches_change_no_bit(tmp_path, batch):
    features = made()
    a, b = (Tally.open(tmp_path / name, TOTAL) for name in "ab")
    feed(a, features, batch=7)
    feed(b, features, batch=batch)
    assert_same(a, b)


@pytest.mark.parametrize("kept", [None, np.arange(3, 100, 9), np.arange(0)])
@pytest.mark.parametrize("saved", [0, 10, 48, 100])
def test_interrupted_and_continued_changes_no_bit(tmp_path, saved, kept):
    features = made()
    whole, first = (Tally.open(tmp_path / name, TOTAL, kept=kept) for name in "ab")
    feed(whole, features)
    feed(first, features, saved)
    first.save()
    feed(first, features, min(saved + 13, TOTAL))  # lost: not saved
    continued = Tally.open(tmp_path / "b", TOTAL, kept=kept)
    assert continued.count == saved
    feed(continued, features, batch=11)
    assert_same(whole, continued)
    stored = (tmp_path / name / "features.npy" for name in "ab")
    assert len({path.read_bytes() for path in stored}) == 1


def test_pending_features_are_copies(tmp_path):
    buffer, t = made(), Tally.open(tmp_path, TOTAL)
    t.update(buffer)
    before = t.stats["pool"].total.copy()
    buffer["pool"][:] = 0
    np.testing.assert_array_equal(t.stats["pool"].total, before)


def test_only_some_features_are_kept(tmp_path):
    features, kept = made(), np.array([0, 5, 6, 20, 99])
    t = Tally.open(tmp_path, TOTAL, ("pool",), kept)
    feed(t, features, 21)
    np.testing.assert_array_equal(t.features, features["pool"][kept[:4]])
    feed(t, features)
    np.testing.assert_array_equal(t.features, features["pool"][kept])
    assert t.stats["pool"].count == TOTAL
    assert t.scores is None
    assert t.stats.keys() == {"pool"}


@pytest.mark.parametrize(
    "other",
    [
        {"total": 101},
        {"parts": ("pool",)},
        {"kept": np.arange(50)},
    ],
)
def test_another_plan_begins_from_nothing(tmp_path, other):
    features, t = made(), Tally.open(tmp_path, TOTAL)
    feed(t, features, 40)
    t.save()
    again = Tally.open(**{"folder": tmp_path, "total": TOTAL} | other)
    assert again.count == 0
    assert again.features.shape[0] == 0


@pytest.mark.parametrize("name", ["sums.npz", "features.npy"])
@pytest.mark.parametrize("harm", ["gone", "cut", "empty"])
def test_damaged_files_begin_from_nothing(tmp_path, name, harm):
    features, t = made(), Tally.open(tmp_path, TOTAL)
    feed(t, features, 40)
    t.save()
    path = tmp_path / name
    data = path.read_bytes()
    path.unlink() if harm == "gone" else path.write_bytes(data[: len(data) // 2 * (harm == "cut")])
    again, fresh = Tally.open(tmp_path, TOTAL), Tally.open(tmp_path / "fresh", TOTAL)
    assert again.count == 0
    feed(again, features)
    feed(fresh, features)
    assert_same(again, fresh)


@pytest.mark.parametrize("part", WIDTHS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_told_and_adds_nothing(tmp_path, part, bad):
    features, t = made(), Tally.open(tmp_path, TOTAL)
    feed(t, features, 20)
    wrong = {k: v[20:30].copy() for k, v in features.items()}
    wrong[part][4, 2] = bad
    with pytest.raises(UserError, match=f"picture 24: its {part} features are not finite"):
        t.update(wrong)
    fresh = Tally.open(tmp_path / "fresh", TOTAL)
    feed(t, features)
    feed(fresh, features)
    assert_same(t, fresh)


def test_wrong_calls_are_refused(tmp_path):
    features, t = made(), Tally.open(tmp_path, TOTAL)
    feed(t, features, 98)
    with pytest.raises(ValueError, match="100"):
        t.update({k: v[:3] for k, v in features.items()})
    with pytest.raises(ValueError, match="logits: features"):
        t.update({k: v[:2, :-1] for k, v in features.items()})
    with pytest.raises(ValueError, match="pictures after"):
        t.update({k: v[: 1 + (k == "pool")] for k, v in features.items()})
    for kept in ([3, 3], [-1, 2], [5, 100]):
        with pytest.raises(ValueError, match="increasing"):
            Tally.open(tmp_path, TOTAL, kept=np.array(kept))


def test_no_picture_yet(tmp_path):
    t = Tally.open(tmp_path, TOTAL)
    assert (t.count, t.stats, t.scores, len(t.features)) == (0, {}, None, 0)


def test_nothing_remains(tmp_path):
    t = Tally.open(tmp_path / "t", TOTAL)
    feed(t, made())
    t.save()
    t.remove()
    assert not (tmp_path / "t").exists()


# What a killed process leaves: it saves every 10 pictures and dies at any moment.
KILLED = """
import sys
import tracemalloc
from pathlib import Path
import numpy as np
from utils import tally
tally.BLOCK = 16
x = {name: np.load(f"{sys.argv[1]}/{name}.npy") for name in ("pool", "spatial", "logits")}
t = tally.Tally.open(Path(sys.argv[1]) / "t", 100)
while True:
    if t.count < 100:
        t.update({name: v[t.count : t.count + 10] for name, v in x.items()})
    t.save()
    print(t.count, flush=True)
"""


def test_a_killed_process_is_continued(tmp_path):
    features = made()
    for name, values in features.items():
        np.save(tmp_path / name, values)
    root = Path(__file__).parents[1]
    for lines in (2, 3, 3):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
        )
        for _ in range(lines):
            told = int(child.stdout.readline())
        child.kill()
        child.communicate()
        left = Tally.open(tmp_path / "t", TOTAL)
        assert left.count >= told
    feed(left, features)
    fresh = Tally.open(tmp_path / "fresh", TOTAL)
    feed(fresh, features)
    assert_same(left, fresh)


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    def peak(total: int) -> int:
        features, t = made(total=total), Tally.open(tmp_path / str(total), total)
        tracemalloc.start()
        feed(t, features, total, batch=8)
        t.save()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(16_000) < 1.2 * peak(1000)  # the features alone would be 384 kB


def test_asking_whether_a_tally_is_whole_disturbs_nobody_at_work_in_it(tmp_path):
    features = {"pool": np.arange(40, dtype=np.float32).reshape(10, 4)}
    tally = Tally.open(tmp_path, 10, ("pool",))
    tally.update({"pool": features["pool"][:3]})
    tally.save()
    tally.update({"pool": features["pool"][3:8]})  # not saved yet
    assert not Tally.is_whole(tmp_path, 10, ("pool",))
    tally.update({"pool": features["pool"][8:]})
    assert not Tally.is_whole(tmp_path, 10, ("pool",))
    tally.save()
    assert Tally.is_whole(tmp_path, 10, ("pool",))
    assert not Tally.is_whole(tmp_path, 11, ("pool",))
    np.testing.assert_array_equal(Tally.open(tmp_path, 10, ("pool",)).features, features["pool"])
