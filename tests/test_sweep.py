"""The evaluator, on pipelines that are known exactly: real pictures, noise, and a mixture."""

import csv
import functools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import toy
from pipelines import classifier, groups, report, runs, sweep, yardsticks
from pipelines.flow import Draw, FlowPipeline
from pipelines.plan import Plan, checked
from pipelines.sweep import draw_labels, grid_labels
from utils import data
from utils.cli import UserError
from utils.sharding import batch_sharding, make_mesh

ROOT = pathlib.Path(__file__).parents[1]
HEADER = (
    "run,objective,train_steps,ema,sampler,grid,steps,nfe,sampling_guidance,guidance_interval,"
    "trained_guidance,train_images,train_flops,metric,features,resize,value,deviation,"
    "deviation_of,num_samples,labels,seed,protocol,reference,reference_fingerprint,commit"
)
KEYS = {"holdout": 0.1, "use_stable_vae": 0, "image_size": 0, "data_dir": ""}
PLAN = Plan(
    workdir=("runs",),
    features=("classifier",),
    metrics=("fid", "nearest"),
    num_samples=130,
    batch_size=64,
    bootstrap=3,
)


class Fake:
    """A run whose samples a test chooses, as a function of (seed, index), label and steps."""

    def __init__(self, make, objective="mean_flow", dataset_name="digits", **card):
        self.make, self.calls, self.name = make, [], "run"
        self.config = ConfigDict(KEYS | {"dataset_name": dataset_name, "objective": objective})
        budget = {"train_steps": 10, "train_images": 640, "train_flops": 1.5e9}
        self.card = {"trained_guidance": 1.0} | budget | card
        self.pipeline = self
        self.path = pathlib.Path(dataset_name)
        self.num_classes = 10 if dataset_name == "digits" else 0

    # As a Run.

    def checkpoints(self, asked):
        return (10,)

    def average(self, asked):
        return asked or "0.99"

    def load(self, step, ema):
        return self

    def identity(self, step, ema):
        return f"{self.name} {self.config.objective}"

    # As a FlowPipeline.

    def check(self, steps, sampler, guidance):
        return sampler or "meanflow"

    def network_calls(self, steps, guidance, interval, sampler, grid):
        return steps * (1 if guidance == 1 else 2)

    def draw(self, labels, *, steps, sampler, grid, guidance, guidance_interval, seed, indices):
        self.calls.append((steps, guidance, seed, labels.copy(), indices.copy()))
        rngs = [np.random.default_rng((seed, int(i))) for i in indices]
        drawn = [self.make(rng, label, steps) for rng, label in zip(rngs, labels, strict=True)]
        padded = np.stack(drawn + drawn[:1] * (-len(drawn) % 8))
        place = batch_sharding(make_mesh())
        finite = np.isfinite(padded.reshape(len(padded), -1)).all(axis=1)
        return Draw(*jax.device_put((padded, finite, finite), place))


def evaluate(runs, plan, out, cache_dir="runs/cache"):
    """Measures and writes, as eval_fid.py does."""
    for name, run in runs.items():
        run.name = name
    plan = checked(plan._replace(out=str(out), cache_dir=str(cache_dir)))
    return report.write(sweep.measure_runs(runs, plan), plan)


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load(Fake(None).config)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A classifier of two seconds does here."""
    quick_classifier(monkeypatch)


def quick_classifier(patch) -> None:
    recipe = classifier.Recipe(steps=150, batch_size=64)
    quick = functools.partial(classifier.extractor, recipe=recipe)
    patch.setattr(groups.classifier, "extractor", quick)


@pytest.fixture(scope="module")
def real(digits):
    """Training pictures of the class that was asked for."""
    train = data.arrays(digits.train)
    places = [np.flatnonzero(train["label"] == k) for k in range(10)]
    return lambda rng, label, steps: train["x"][rng.choice(places[label])]


def noise(rng, label, steps):
    return rng.integers(0, 256, (8, 8, 1)).astype(np.uint8)


def rows_of(out) -> list[dict]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def pick(rows, **wanted) -> list[float]:
    return [
        float(row["value"])
        for row in rows
        if all(row[key] == str(value) for key, value in wanted.items())
    ]


# Labels.


def test_labels_are_uniform_and_a_function_of_seed_and_index():
    labels = draw_labels(3, 50_000, 10)
    np.testing.assert_array_equal(draw_labels(3, 1000, 10), labels[:1000])
    assert not np.array_equal(draw_labels(4, 1000, 10), labels[:1000])
    np.testing.assert_allclose(np.bincount(labels) / 50_000, 0.1, atol=0.006)
    assert not draw_labels(3, 100, 0).any()


def test_balanced_labels_have_every_class_as_often():
    labels = draw_labels(3, 1000, 10, "balanced")
    assert np.bincount(labels).tolist() == [100] * 10
    np.testing.assert_array_equal(draw_labels(4, 37, 10, "balanced"), labels[:37])


@pytest.mark.parametrize(("classes", "n", "shown"), [(0, 100, 1), (3, 90, 3), (10, 100, 10)])
def test_grids_have_whole_rows_of_a_class(classes, n, shown):
    rows = grid_labels(classes).reshape(-1, 10)
    assert rows.size == n
    assert np.all(rows == rows[:, :1])
    assert len(np.unique(rows)) == shown


def test_many_classes_are_thinned_evenly():
    assert np.unique(grid_labels(1000)).tolist() == list(range(0, 1000, 111))


# Pictures.


@pytest.fixture(scope="module")
def result(real, tmp_path_factory, cache):
    """Two runs at two step counts and two scales of guidance, N = 130."""
    with pytest.MonkeyPatch.context() as patch:
        quick_classifier(patch)
        out = tmp_path_factory.mktemp("out")
        runs = {"copies": Fake(real, trained_guidance=2.0), "static": Fake(noise, "flow_matching")}
        plan = PLAN._replace(steps=(4, 1), guidance=(1.0, 3.0), seed=(5,))
        text = evaluate(runs, plan, out, cache)
    return out, text, runs


def test_csv_has_the_columns_and_every_cell(result):
    out, _, _ = result
    assert (out / "results.csv").read_text().splitlines()[0] == HEADER
    rows = [row for row in rows_of(out) if row["metric"] == "fd_classifier" and row["steps"]]
    assert len(rows) == 8
    cells = [(r["run"], r["sampling_guidance"], r["steps"], r["nfe"]) for r in rows]
    places = [("1.0", "1", "1"), ("1.0", "4", "4"), ("3.0", "1", "2"), ("3.0", "4", "8")]
    assert cells == [(run, *place) for run in ("copies", "static") for place in places]
    for row in rows:
        assert (row["train_steps"], row["train_images"], row["seed"]) == ("10", "640", "5")
        assert (row["ema"], row["sampler"], row["guidance_interval"]) == ("0.99", "meanflow", "0:1")
        assert row["trained_guidance"] == {"copies": "2.0", "static": "1.0"}[row["run"]]
        assert row["objective"] == {"copies": "mean_flow", "static": "flow_matching"}[row["run"]]
        assert float(row["train_flops"]) == 1.5e9
        assert row["num_samples"] == "130"
        assert row["labels"] == "random"
        assert "held-out accuracy" in row["protocol"]
        assert 0 < float(row["deviation"]) < float(row["value"])
        assert row["reference"] == "training split of digits, 1,617 pictures"


def test_real_rows_have_no_steps_and_their_own_n(result, digits):
    out, _, _ = result
    empty = ("steps", "nfe", "sampling_guidance", "trained_guidance", "train_steps")
    rows = [row for row in rows_of(out) if row["objective"] == "real data"]
    assert all(row[name] == "" for row in rows for name in empty)
    found = [(row["metric"], row["run"], row["num_samples"]) for row in rows]
    held = str(len(digits.heldout))
    assert found == [
        ("fd_classifier", yardsticks.DRAWS, "130"),
        ("fd_classifier", yardsticks.DRAWS, held),
        ("fd_classifier", yardsticks.HELDOUT, held),
        ("nearest_train_distance", yardsticks.HELDOUT, held),
    ]
    assert rows[0]["deviation_of"] == "5 draws with replacement"


def test_copies_score_like_bootstrap_draws_and_noise_does_not(result):
    rows = rows_of(result[0])
    floor = pick(rows, metric="fd_classifier", run=yardsticks.DRAWS, num_samples=130)[0]
    copies = pick(rows, metric="fd_classifier", run="copies")
    assert max(copies) < 3 * floor
    assert min(pick(rows, metric="fd_classifier", run="static")) > 10 * max(copies)
    larger = pick(rows, metric="fd_classifier", run=yardsticks.DRAWS, num_samples=180)[0]
    assert larger < floor  # more pictures, less bias


def test_memorising_shows_in_the_nearest_training_picture(result):
    rows = rows_of(result[0])
    held = pick(rows, metric="nearest_train_distance", run=yardsticks.HELDOUT)[0]
    assert pick(rows, metric="nearest_train_distance", run="copies") == [0.0] * 4
    assert 0.05 < held < 0.3
    assert min(pick(rows, metric="nearest_train_distance", run="static")) > 1.5 * held


def test_every_index_is_drawn_once_per_cell_and_grids_share_their_noise(result):
    _, _, runs = result
    for run in runs.values():
        seen = {}
        for steps, guidance, seed, labels, indices in run.calls:
            assert seed == 5
            assert len(indices) == 64  # one size: one compilation
            seen.setdefault((steps, guidance), []).append((indices, labels))
        assert set(seen) == {(1, 1.0), (4, 1.0), (1, 3.0), (4, 3.0)}
        for batches in seen.values():
            table, grid = batches[:3], batches[3:]
            assert np.concatenate([i for i, _ in table]).tolist() == list(range(192))
            drawn = np.concatenate([labels for _, labels in table])[:130]
            np.testing.assert_array_equal(drawn, draw_labels(5, 130, 10))
            assert np.concatenate([i for i, _ in grid])[:100].tolist() == list(range(100))
            shown = np.concatenate([labels for _, labels in grid])[:100]
            np.testing.assert_array_equal(shown, grid_labels(10))


def test_the_table_is_printed_as_written_and_says_how_to_read_it(result):
    out, text, _ = result
    assert (out / "results.md").read_text(encoding="utf-8") == text
    assert "| run | objective | ω′ trained | ω sampling |" in text
    assert "| 1 step | 4 steps |" in text
    assert text.count("Lower is better") == 1
    assert "glances at few pictures" in text
    line = next(line for line in text.splitlines() if line.startswith("| copies"))
    rows = [row for row in rows_of(out) if row["run"] == "copies"]
    rows = [r for r in rows if r["metric"] == "fd_classifier" and r["sampling_guidance"] == "1.0"]
    shown = ["copies", "MeanFlow", "2", "none", "640", "1.5e+09"]
    shown += [f"{float(r['value']):.3g} ± {float(r['deviation']):.2g}" for r in rows]
    assert [word.strip() for word in line.strip("|").split("|")] == shown
    assert "| flow matching | none | 3 |" in text


def test_json_says_how_each_number_was_made(result):
    out, _, _ = result
    found = json.loads((out / "results.json").read_text())
    assert [str(row["value"]) for row in found["rows"]] == [r["value"] for r in rows_of(out)]
    assert found["plan"]["num_samples"] == 130
    assert {"jax", "numpy"} <= found["versions"].keys()
    assert len({row["reference_fingerprint"] for row in found["rows"]}) == 1


def test_all_pictures_are_there_and_nothing_half_done(result):
    out, _, _ = result
    cells = [
        f"samples_{r}_{s}_g{w}.png" for r in ("copies", "static") for s in (1, 4) for w in (1, 3)
    ]
    results = ["results.csv", "results.json", "results.md", "results.png", "samples.png", "cells"]
    assert sorted(path.name for path in out.iterdir()) == sorted(cells + results)
    assert {path.suffix for path in (out / "cells").iterdir() if path.is_file()} == {
        ".json",
        ".npz",
    }
    assert not list((out / "cells" / "work").iterdir())  # of what was interrupted


def test_batch_size_changes_no_row(real, tmp_path, cache):
    def mixture(rng, label, steps):
        return (real(rng, label, steps) * 0.9 + 0.1 * noise(rng, label, steps)).astype(np.uint8)

    tables = []
    for size in (7, 64):
        run = Fake(mixture)
        plan = PLAN._replace(steps=(2,), num_samples=65, batch_size=size)
        evaluate({"run": run}, plan, tmp_path / str(size), cache)
        assert {len(indices) for *_, indices in run.calls} == {size}
        tables.append(rows_of(tmp_path / str(size)))
    values = [[float(row.pop("value")) for row in table] for table in tables]
    deviations = [[float(row.pop("deviation") or 0) for row in table] for table in tables]
    assert tables[0] == tables[1]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
    np.testing.assert_allclose(deviations[0], deviations[1], rtol=1e-3)


def test_a_failing_call_leaves_older_results_alone(real, tmp_path, cache, monkeypatch):
    plan = PLAN._replace(steps=(1,), num_samples=20)
    evaluate({"run": Fake(real)}, plan, tmp_path, cache)
    before = contents(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report.figures, "save_mosaic", fail)  # what is drawn last
    with pytest.raises(OSError, match="disk full"):
        evaluate({"run": Fake(noise, "flow_matching")}, plan, tmp_path, cache)
    assert contents(tmp_path) == before


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_samples_stand_under_their_step_count(tmp_path, cache, monkeypatch):
    def grey(rng, label, steps):
        return np.full((8, 8, 1), 10 * label + steps, np.uint8)

    drawn = []
    monkeypatch.setattr(report.figures, "save_mosaic", lambda _, *drawing: drawn.append(drawing))
    plan = PLAN._replace(steps=(8, 1), num_samples=20)
    evaluate({"run": Fake(grey)}, plan, tmp_path, cache)
    ((tiles,), names) = drawn[0]
    assert names == ["MeanFlow"]
    assert [tile.title for tile in tiles] == ["1 step", "8 steps"]
    for tile, steps in zip(tiles, (1, 8), strict=True):
        rows = tile.content[26::50, 26, 0]  # the middle of the first picture of each row
        assert rows.tolist() == [10 * label + steps for label in range(10)]
        single = Image.open(tmp_path / f"samples_run_{steps}.png")
        assert single.getpixel((26, 76)) == 10 + steps


# Points.


def points(scale):
    def make(rng, label, steps):
        return (rng.normal(size=2) * scale / steps).astype(np.float32)

    return make


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    out = tmp_path_factory.mktemp("plane")
    runs = {
        "moons_mf": Fake(points(1.0), "mean_flow", "two_moons"),
        "moons_fm": Fake(points(9.0), "flow_matching", "two_moons"),
        "board_mf": Fake(points(1.0), "mean_flow", "checkerboard"),
    }
    plan = PLAN._replace(steps=(1, 8), num_samples=500, batch_size=128)
    return out, evaluate(runs, plan, out)


def test_points_are_measured_by_sliced_wasserstein(plane):
    out, text = plane
    rows = rows_of(out)
    assert {row["metric"] for row in rows} == {"sliced_wasserstein"}
    assert {row["num_samples"] for row in rows} == {"500"}
    near = pick(rows, run="moons_mf", steps=1)[0]  # a Gaussian of the data's own size
    assert near < 0.5
    assert pick(rows, run="moons_fm", steps=1)[0] > 10 * near
    floors = pick(rows, objective="real data")
    assert len(floors) == 2  # one per data set
    assert max(floors) < near
    assert "as many held-out points of checkerboard" in text
    assert sorted(path.name for path in out.iterdir()) == [
        "cells",
        "results.csv",
        "results.json",
        "results.md",
        "results.png",
        "samples.png",
    ]


def test_more_points_than_are_held_out_is_an_error(tmp_path):
    run = Fake(points(1.0), dataset_name="two_moons")
    with pytest.raises(UserError, match="num_samples=20000 or less"):
        evaluate({"run": run}, PLAN._replace(num_samples=20_001), tmp_path)


# Mistakes.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": ()}, "--steps is empty"),
        ({"steps": (1, 0)}, "--steps=0"),
        ({"guidance": ()}, "--guidance is empty"),
        ({"guidance": (float("nan"),)}, "finite numbers"),
        ({"guidance_interval": ("0.5",)}, "LOW:HIGH within 0:1"),
        ({"guidance_interval": ("0.8:0.2",)}, "LOW:HIGH within 0:1"),
        ({"num_samples": 3}, "--num_samples=3: at least 4"),
        ({"bootstrap": 1}, "one draw has no spread"),
        ({"num_samples": -1}, "--num_samples=-1: at least 0"),
        ({"batch_size": 0}, "--batch_size=0"),
        ({"seed": (-1,)}, "--seed=-1"),
        ({"sampler": ("eulr",)}, "--sampler=eulr: there are meanflow, euler, heun"),
        ({"features": ("vgg",)}, "--features=vgg: there are inception"),
        ({"metrics": ("fud",)}, "--metrics=fud: there are fid"),
        ({"metrics": ("sfid",)}, "sfid is defined by Inception"),
        ({"protocol": ("tf",)}, "--protocol=tf: classifier has none"),
        ({"weights": ("a", "b")}, "2 files for 1 features"),
        ({"samples": ("pictures",)}, "do not go together"),
        ({"workdir": ()}, "--workdir=FOLDER of a run, or --samples"),
        ({"workdir": (), "samples": ("pictures",)}, "give --reference=FOLDER"),
        ({"expires": 1}, "--expires=1: at least 10"),
    ],
)
def test_impossible_plans_are_refused_before_anything_is_sampled(change, words, tmp_path):
    run = Fake(noise)
    with pytest.raises(UserError, match=words):
        evaluate({"run": run}, PLAN._replace(**change), tmp_path / "new")
    assert not run.calls
    assert not (tmp_path / "new").exists()


def test_pictures_of_different_data_sets_share_no_table(tmp_path):
    runs = {"a": Fake(noise), "b": Fake(noise, dataset_name="two_moons")}
    with pytest.raises(UserError, match="a on digits, b on two_moons"):
        evaluate(runs, PLAN, tmp_path)


def test_data_that_the_run_was_not_trained_on_is_an_error(tmp_path, digits):
    run = Fake(noise, dataset="digits 000000000000")
    with pytest.raises(UserError, match="was trained on digits 0000"):
        evaluate({"run": run}, PLAN, tmp_path)


# The command.


def test_runs_are_named_by_their_folders_as_short_as_can_be(tmp_path):
    folders = [tmp_path / name for name in ("a/mean_flow", "b/mean_flow", "a/flow_matching")]
    names = runs.run_names([*folders, folders[0]])  # twice the same run is one run
    assert list(names) == ["a_mean_flow", "b_mean_flow", "flow_matching"]
    assert list(names.values()) == folders
    with pytest.raises(UserError, match="rename one"):
        runs.run_names([tmp_path / "x/a/mean_flow", tmp_path / "y/a/mean_flow"])


def call(*flags) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "eval_fid.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_measures_exported_runs(tmp_path):
    config = toy.get_config("two_moons")
    config.model.update({"depth": 1, "hidden_size": 16})
    config.objective = "mean_flow"
    for folder in ("a/mean_flow", "b/mean_flow"):
        export(config, tmp_path / folder)
    flags = [f"--workdir={tmp_path / name / 'mean_flow'}" for name in "ab"]
    out = tmp_path / "out"
    done = call(*flags, "--steps=1,3", "--num_samples=50", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "a_mean_flow" in done.stdout
    rows = rows_of(out)
    assert [r["run"] for r in rows[:4]] == ["a_mean_flow"] * 2 + ["b_mean_flow"] * 2
    assert [r["nfe"] for r in rows[:4]] == ["1", "3", "1", "3"]


def export(config: ConfigDict, folder: pathlib.Path) -> None:
    """Writes a network that was never trained."""
    dataset = data.load(config)
    card = {
        "dataset": f"{dataset.name} {dataset.fingerprint}",
        "shape": list(dataset.shape),
        "num_classes": dataset.num_classes,
        "trained_guidance": 1.0,
        **dict.fromkeys(("train_steps", "train_images", "train_flops", "parameters"), 0),
    }
    pipeline = FlowPipeline.build(config, card)
    params = pipeline.network.init(jax.random.key(0))
    pipeline.with_params(params).save_pretrained(folder)


def test_a_missing_run_is_told_in_one_line(tmp_path):
    done = call(f"--workdir={tmp_path / 'nothing'}", "--steps=1")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "nothing" in done.stderr


# Several of everything.


def test_seeds_give_a_mean_and_a_deviation(tmp_path, cache, real):
    plan = PLAN._replace(steps=(1,), seed=(0, 1, 2), metrics=("fid",), num_samples=40)
    text = evaluate({"run": Fake(real)}, plan, tmp_path, cache)
    values = pick(rows_of(tmp_path), metric="fd_classifier", run="run")
    assert len(set(values)) == 3
    mean, spread = np.mean(values), np.std(values, ddof=1)
    assert f"| {report._short(mean)} ± {report._short(spread, 2)} |" in text


def test_a_line_for_each_sampler_average_and_guidance_interval(tmp_path, cache, real):
    plan = PLAN._replace(
        steps=(1, 2),
        sampler=("euler", "heun"),
        ema=("0.99", "none"),
        guidance=(1.0, 2.0),
        guidance_interval=("0:1", "0.2:0.8"),
        metrics=("fid",),
        num_samples=20,
    )
    text = evaluate({"run": Fake(real)}, plan, tmp_path, cache)
    rows = [row for row in rows_of(tmp_path) if row["steps"]]
    kinds = {(r["sampler"], r["ema"], r["sampling_guidance"], r["guidance_interval"]) for r in rows}
    assert len(kinds) == 2 * 2 * 3  # no guidance has no interval
    assert len(rows) == 2 * len(kinds)
    assert "| run | objective | EMA | sampler | ω′ trained | ω sampling | guided at t |" in text
    names = {path.name for path in tmp_path.glob("samples_*.png")}
    assert "samples_run_2_emanone_heun_g2_t0.2-0.8.png" in names
    assert len(names) == len(rows)


def test_the_same_command_measures_nothing_and_a_larger_one_what_is_new(tmp_path, cache, real):
    run = Fake(real)
    plan = PLAN._replace(steps=(1, 2), num_samples=40, batch_size=40)
    evaluate({"run": run}, plan, tmp_path, cache)
    before, calls = rows_of(tmp_path), len(run.calls)
    evaluate({"run": run}, plan, tmp_path, cache)
    assert len(run.calls) == calls
    assert rows_of(tmp_path) == before
    evaluate({"run": run}, plan._replace(steps=(1, 2, 4)), tmp_path, cache)
    assert {steps for steps, *_ in run.calls[calls:]} == {4}
    added = rows_of(tmp_path)
    assert [row for row in added if row["steps"] != "4"] == before
    calls = len(run.calls)
    evaluate({"run": run}, plan._replace(metrics=("fid", "nearest", "kid")), tmp_path, cache)
    assert {steps for steps, *_ in run.calls[calls:]} == {1, 2}  # kid needs the samples once more
    calls = len(run.calls)
    evaluate({"run": run}, plan, tmp_path, cache)  # what was measured stays
    assert len(run.calls) == calls
    assert rows_of(tmp_path) == before


def test_pictures_are_kept_where_that_is_asked(tmp_path, cache, real):
    plan = PLAN._replace(steps=(2,), num_samples=30, metrics=("fid",), save_samples="png")
    run = Fake(real)
    evaluate({"run": run}, plan, tmp_path, cache)
    (folder,) = (tmp_path / "samples").iterdir()
    files = sorted(folder.iterdir())
    assert len(files) == 30
    drawn = real(np.random.default_rng((0, 7)), draw_labels(0, 30, 10)[7], 2)
    np.testing.assert_array_equal(np.asarray(Image.open(files[7]))[..., None], drawn)
    evaluate({"run": run}, plan._replace(save_samples="npz"), tmp_path, cache)
    (file,) = (tmp_path / "samples").glob("*.npz")
    with np.load(file) as arrays:
        assert arrays["arr_0"].shape == (30, 8, 8, 3)
        np.testing.assert_array_equal(arrays["arr_0"][7, ..., :1], drawn)


def test_grids_of_times_are_lines_of_the_table_and_equal_ones_are_drawn_once(real, cache, tmp_path):
    run = Fake(real)
    plan = PLAN._replace(steps=(2, 3), grid=("uniform", "cosine"), metrics=("fid",))
    table = evaluate({"run": run}, plan, tmp_path, cache)
    assert "| uniform |" in table and "| cosine |" in table
    found = rows_of(tmp_path)
    assert len(pick(found, metric="fd_classifier", grid="cosine", steps=3)) == 1
    one = [pick(found, metric="fd_classifier", grid=name, steps=2) for name in plan.grid]
    assert len(one[0]) == 1 and one[0] == one[1]
    measured = [steps for steps, *_ in run.calls if steps]
    again = Fake(real)
    evaluate({"run": again}, plan, tmp_path, cache)
    assert not again.calls and measured.count(2) < measured.count(3)
