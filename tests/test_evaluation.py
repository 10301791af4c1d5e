"""The evaluator as a whole: batches and devices, killed and rival processes, exchanged files."""

import collections
import csv
import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import runpy
import subprocess
import sys
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from pipelines import extractors, flow, jobs, measure, prepare, prepare_statistics, report, sweep
from pipelines.extractors import Extractor
from pipelines.flow import FlowPipeline
from pipelines.plan import Plan, checked
from tests.conftest import thorough
from tests.test_mobilenet import random_tensors
from tests.test_pipeline import pipeline
from utils import sharding, statistics
from utils.cli import UserError

ROOT = pathlib.Path(__file__).parents[1]


# A light extractor, all that Inception gives in small.


def light(
    name: str = "inception", protocol: str = "", weights: str = "", cache_dir=""
) -> Extractor:
    """Stands for `extractors.load`: a random layer on an 8 × 8 miniature; `weights`: its seed."""
    rng = np.random.default_rng(len(weights))
    widths = {"pool": 16, "spatial": 12, "logits": 10}
    layers = {
        part: jnp.asarray(rng.standard_normal((192, width)) / 8, jnp.float32)
        for part, width in widths.items()
    }
    protocol = protocol or extractors.PROTOCOLS[name][0]
    apply = jax.tree_util.Partial(_light, layers)
    return Extractor(name, protocol, "a light one", f"light{len(weights)}{protocol}", apply, widths)


def _light(layers: dict, pictures: jax.Array) -> dict[str, jax.Array]:
    x = jnp.broadcast_to(pictures, (*pictures.shape[:3], 3)).astype(jnp.float32) / 127.5 - 1
    x = jax.image.resize(x, (len(x), 8, 8, 3), "linear").reshape(len(x), -1)
    return {part: jnp.tanh(x @ layer) for part, layer in layers.items()}


@pytest.fixture
def light_features(monkeypatch):
    monkeypatch.setattr(extractors, "load", light)


# Pictures, runs and rows.


def patches(count: int, seed: int, size: int = 16) -> np.ndarray:
    """uint8 (count, size, size, 3), each picture of its own coarse colours."""
    coarse = np.random.default_rng(seed).integers(256, size=(count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


def write_folder(folder: pathlib.Path, pictures: np.ndarray) -> pathlib.Path:
    folder.mkdir(parents=True)
    for i, x in enumerate(pictures):
        PIL.Image.fromarray(x).save(folder / f"{i:03d}.png")
    return folder


def write_zip(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return path


def write_npz(path: pathlib.Path, **arrays: np.ndarray) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def export(folder: pathlib.Path, classes: int = 0, scale: float = 1.0) -> pathlib.Path:
    """A run's exported network with random weights, times `scale`; pictures of 8 × 8 × 1."""
    small = pipeline("mean_flow", classes)
    known = {"trained_guidance": 1.0, "train_images": 640, "train_flops": 1.5e9}
    card = small.card | known | {"dataset": "digits 0"}
    params = jax.tree.map(lambda leaf: leaf * scale, small.params)
    dataclasses.replace(small, card=card, params=params).save_pretrained(folder)
    return folder


def evaluated(plan: Plan) -> list[dict]:
    """The rows of `results.csv`, which `eval_fid.py` would have written."""
    plan = checked(plan)
    report.write(sweep.run(plan), plan)
    return rows_of(pathlib.Path(plan.out))


def rows_of(out: pathlib.Path) -> list[dict]:
    """Rows without the commit, which may change under a developer's tests."""
    with (out / "results.csv").open(newline="") as file:
        return [{**row, "commit": ""} for row in csv.DictReader(file)]


def values(rows: list[dict], run: str = "") -> dict[str, float]:
    """metric → value, of the rows about samples."""
    real = "real data"
    return {
        row["metric"]: float(row["value"])
        for row in rows
        if row["objective"] != real and (not run or row["run"] == run)
    }


# Batches and devices.


@pytest.fixture
def mobilenet(tmp_path) -> pathlib.Path:
    """Real weights, or random ones where there are none."""
    real = ROOT.parent / "shared" / "weights" / "mobilenet_v1_075_imagenet_fp32.npz"
    return real if real.exists() else write_npz(tmp_path / "weights.npz", **random_tensors())


@thorough
def test_neither_devices_nor_batches_change_a_result(mobilenet, tmp_path, monkeypatch):
    plan = Plan(
        workdir=(str(export(tmp_path / "run", classes=10)),),
        features=("mobilenet",),
        weights=(str(mobilenet),),
        reference=str(write_npz(tmp_path / "real.npz", arr_0=patches(16, 0, size=8))),
        steps=(2,),
        num_samples=24,
        metrics=("fid", "kid"),
        bootstrap=0,
    )

    def found(name: str, size: int) -> dict[str, float]:
        places = {"out": str(tmp_path / name), "cache_dir": str(tmp_path / name)}
        return values(evaluated(plan._replace(batch_size=size, **places)))

    usual = found("usual", 64)
    assert set(usual) == {"fd_mobilenet", "kd_mobilenet"}
    small = found("small", 7)
    one_device = sharding.make_mesh(devices=jax.devices()[:1])
    for module in (flow, measure):
        monkeypatch.setattr(module, "make_mesh", lambda: one_device)
    alone = found("alone", 64)
    for other in (small, alone):
        assert other == pytest.approx(usual, rel=1e-3)


# Killed and rival processes.


def command(arguments: list[str], log: pathlib.Path, pause: float) -> None:
    """Runs eval_fid.py in this process: light features, every batch saved, every draw logged."""
    with log.with_suffix(".out").open("ab") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    measure.SAVE_SECONDS, jobs.PAUSE = 0.0, 0.1
    extractors.load = light
    draw, grid, grids = FlowPipeline.draw, sweep._grid, []

    def told_grid(group, cell):
        grids.append(cell)
        return grid(group, cell)

    def told(self, labels, **options):
        cell = options["steps"], options["seed"]
        is_grid = cell in [(one.steps, one.seed) for one in grids]
        line = [os.getpid(), *cell, int(options["indices"][0]), is_grid]
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(pause)
        return draw(self, labels, **options)

    FlowPipeline.draw, sweep._grid = told, told_grid
    sys.argv = ["eval_fid.py", *arguments]
    runpy.run_path(str(ROOT / "eval_fid.py"), run_name="__main__")


class Draw(collections.namedtuple("Draw", "pid steps seed first grid")):
    """The draw of a batch: of which cell, and from which sample on."""

    @property
    def cell(self) -> tuple[int, int]:
        return self.steps, self.seed


def draws(log: pathlib.Path) -> list[Draw]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [Draw(*json.loads(line)) for line in lines]


def counted(found: list[Draw]) -> int:
    """Draws that are not of grids."""
    return sum(not draw.grid for draw in found)


def done_cells(out: pathlib.Path) -> set[tuple[int, int]]:
    about = [json.loads(path.read_text())["about"] for path in (out / "cells").glob("*.json")]
    return {(a["steps"], a["seed"]) for a in about if "steps" in a}


CELLS, BATCHES = 4, 6  # of 16 samples in a cell


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A run and a reference."""
    folder = tmp_path_factory.mktemp("sweep")
    export(folder / "run")
    write_npz(folder / "real.npz", arr_0=patches(40, 0, size=8))
    return folder


@pytest.fixture(scope="module")
def begin(folder):
    """Starts eval_fid.py on a process of its own; what still runs at the end is killed."""
    context = multiprocessing.get_context("forkserver")  # modules are imported once for all
    context.set_forkserver_preload([__name__, "orbax.checkpoint"])
    started = []

    def begin(out: pathlib.Path, log: pathlib.Path, pause: float = 0.02):
        flags = {
            "workdir": folder / "run",
            "reference": folder / "real.npz",
            "out": out,
            "cache_dir": out / "cache",
            "steps": "1,2",
            "seed": "0,1",
            "num_samples": 96,
            "batch_size": 16,
            "bootstrap": 2,
        }
        arguments = [f"--{name}={value}" for name, value in flags.items()]
        out.mkdir(exist_ok=True)
        started.append(context.Process(target=command, args=(arguments, log, pause)))
        started[-1].start()
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.join()


def ended(process, log: pathlib.Path) -> None:
    process.join(120)
    assert process.exitcode == 0, log.with_suffix(".out").read_text()


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(begin, folder) -> list[dict]:
    out, log = folder / "undisturbed", folder / "undisturbed.log"
    ended(begin(out, log), log)
    found = draws(log)
    assert counted(found) == CELLS * BATCHES
    assert len({draw.cell for draw in found}) == CELLS
    rows = rows_of(out)
    assert len(rows) > CELLS * 5
    return rows


def test_a_sweep_killed_several_times_gives_the_same_rows_and_repeats_no_cell(
    begin, undisturbed, tmp_path
):
    out, log, rng = tmp_path / "out", tmp_path / "log", random.Random(0)
    kills = []
    for more in (2, 10, 5, 17):
        before = len(draws(log))
        process = begin(out, log)
        wait_for(lambda: len(draws(log)) >= before + more, process)  # noqa: B023
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -9  # not before it was done
        kills.append((len(draws(log)), done_cells(out)))
    ended(begin(out, log), log)

    assert rows_of(out) == undisturbed
    found = draws(log)
    for at, done in kills:
        assert not done & {draw.cell for draw in found[at:]}
    assert kills[-1][1]  # some were done by then
    assert any(found[at].first and not found[at].grid for at, _ in kills)  # it went on in a cell
    # Two batches at most are under way and not saved when a process dies.
    assert CELLS * BATCHES <= counted(found) <= CELLS * BATCHES + 2 * len(kills)


def test_two_processes_divide_the_cells(begin, undisturbed, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    both = [begin(out, log, pause=0.06) for _ in range(2)]
    for process in both:
        ended(process, log)
    found = draws(log)
    assert rows_of(out) == undisturbed
    assert counted(found) == CELLS * BATCHES
    assert {draw.pid for draw in found} == {process.pid for process in both}
    assert len({(draw.pid, draw.cell) for draw in found}) == CELLS


def test_the_cell_of_a_killed_process_is_taken_over(begin, undisturbed, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    victim, survivor = (begin(out, log, pause=0.1) for _ in range(2))

    def both_are_at_work() -> bool:
        count = collections.Counter(draw.pid for draw in draws(log))
        return count[victim.pid] >= 4 and count[survivor.pid] >= 1

    wait_for(both_are_at_work, victim)
    victim.kill()
    victim.join()
    last = [draw for draw in draws(log) if draw.pid == victim.pid][-1].cell
    ended(survivor, log)
    assert rows_of(out) == undisturbed
    found = draws(log)
    by = {draw.pid: {d.cell for d in found if d.pid == draw.pid} for draw in found}
    assert by[victim.pid] & by[survivor.pid] <= {last}
    assert by[victim.pid] | by[survivor.pid] == {(s, seed) for s in (1, 2) for seed in (0, 1)}
    assert CELLS * BATCHES <= counted(found) <= CELLS * BATCHES + 2


# Pictures made elsewhere.


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> pathlib.Path:
    """The same pictures as a folder, a zip and an npz: 24 samples, and 40 real ones."""
    root = tmp_path_factory.mktemp("sets")
    for kind, count, seed in (("samples", 24, 1), ("real", 40, 2)):
        pictures = patches(count, seed)
        folder = write_folder(root / kind / "folder", pictures)
        write_zip(root / kind / "zip.zip", folder)
        write_npz(root / kind / "npz.npz", arr_0=pictures)
    return root


ALL = ("fid", "sfid", "is", "kid", "precision", "recall")


def plan_of(samples, real, out: pathlib.Path, **change) -> Plan:
    usual = Plan(
        samples=tuple(map(str, samples)),
        reference=str(real),
        out=str(out),
        cache_dir=str(out / "cache"),
        bootstrap=2,
    )
    return usual._replace(**change)


def test_a_folder_a_zip_and_an_npz_give_the_same_numbers(sets, tmp_path, light_features):
    names = ("folder", "zip.zip", "npz.npz")
    tables = []
    for real in names:
        plan = plan_of([sets / "samples" / name for name in names], sets / "real" / real, tmp_path)
        rows = evaluated(plan._replace(out=str(tmp_path / real), batch_size=len(tables) + 9))
        folder, zipped, npz = (
            [row | {"run": ""} for row in rows if row["run"] == name]
            for name in ("folder", "zip", "npz")
        )
        assert folder == zipped == npz
        assert tuple(values(folder)) == ALL
        assert {row["num_samples"] for row in folder} == {"24"}
        tables.append(values(folder))
    for table in tables[1:]:
        assert table == pytest.approx(tables[0], rel=1e-5)


def test_pictures_compared_with_themselves(sets, tmp_path, light_features):
    rows = evaluated(plan_of([sets / "real" / "npz.npz"], sets / "real" / "folder", tmp_path))
    found = values(rows, "npz")
    assert (found["precision"], found["recall"]) == (1, 1)
    others = evaluated(plan_of([sets / "samples" / "folder"], sets / "real" / "folder", tmp_path))
    for metric in ("fid", "sfid"):
        assert abs(found[metric]) < 1e-7 * values(others, "folder")[metric]


@pytest.fixture(scope="module")
def against_pictures(sets, tmp_path_factory) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractors, "load", light)
        out = tmp_path_factory.mktemp("against")
        plan = plan_of([sets / "samples" / "folder"], sets / "real" / "folder", out)
        return values(evaluated(plan), "folder")


def test_statistics_serve_as_the_pictures_do(sets, against_pictures, tmp_path, light_features):
    path = tmp_path / "statistics.npz"
    wanted = prepare_statistics.Wanted(statistics=str(path), cache_dir=str(tmp_path / "cache"))
    source = prepare.Plan(out="", source=str(sets / "real" / "folder"), image_size=16)
    told = prepare_statistics.write(wanted, source)
    assert "40 pictures" in told
    rows = evaluated(plan_of([sets / "samples" / "folder"], path, tmp_path / "out"))
    found = values(rows, "folder")
    assert tuple(found) == ALL  # features are in the file
    for metric in ("fid", "sfid", "is", "precision", "recall"):
        assert found[metric] == pytest.approx(against_pictures[metric], rel=1e-6)
    assert {row["reference_fingerprint"] for row in rows} == {statistics.read(path).fingerprint}


@pytest.mark.parametrize("kind", ["adm", "adm without pictures", "jax-flow", "mean flow"])
def test_statistics_of_other_tools_serve_too(
    kind, sets, against_pictures, tmp_path, light_features
):
    real = patches(40, 2)
    features = {k: np.asarray(v, np.float64) for k, v in light("inception").apply(real).items()}
    mu, mu_s = (features[part].mean(0) for part in ("pool", "spatial"))
    sigma, sigma_s = (np.cov(features[part], rowvar=False) for part in ("pool", "spatial"))
    spatial = {"mu_s": mu_s, "sigma_s": sigma_s}
    arrays, metrics = {
        "adm": ({"arr_0": real, "mu": mu, "sigma": sigma, **spatial}, ALL),
        "adm without pictures": ({"mu": mu, "sigma": sigma, **spatial}, ("fid", "sfid", "is")),
        "jax-flow": ({"mu": mu, "sigma": sigma}, ("fid", "is")),
        "mean flow": ({"ref_mu": mu, "ref_sigma": sigma}, ("fid", "is")),
    }[kind]
    path = write_npz(tmp_path / "reference.npz", **arrays)
    rows = evaluated(plan_of([sets / "samples" / "folder"], path, tmp_path / "out"))
    found = values(rows, "folder")
    assert tuple(found) == metrics
    expected = {metric: against_pictures[metric] for metric in metrics}
    assert found == pytest.approx(expected, rel=1e-5)


def test_real_features_order_faces_noisy_faces_and_other_pictures(shared, tmp_path):
    def read(name: str, first: int, last: int) -> np.ndarray:
        with zipfile.ZipFile(shared / "data" / name) as archive:
            files = sorted(file for file in archive.namelist() if file.endswith(".jpg"))
            opened = [PIL.Image.open(archive.open(file)) for file in files[first:last]]
            return np.stack([np.asarray(picture.convert("RGB")) for picture in opened])

    faces = read("omi_faces_400_256.zip", 0, 32)
    noise = 25 * np.random.default_rng(0).standard_normal(faces.shape)
    found = {
        "faces": faces,
        "noisy": np.rint(faces + noise).clip(0, 255).astype(np.uint8),
        "others": read("imagenet_sample_200_256.zip", 0, 32),
    }
    paths = [write_npz(tmp_path / f"{name}.npz", arr_0=x) for name, x in found.items()]
    real = write_folder(tmp_path / "real", read("omi_faces_400_256.zip", 32, 96))
    weights = shared / "weights" / "mobilenet_v1_075_imagenet_fp32.npz"
    chosen = {"features": ("mobilenet",), "weights": (str(weights),), "metrics": ("fid",)}
    rows = evaluated(plan_of(paths, real, tmp_path / "out", bootstrap=0, batch_size=32, **chosen))
    faces, noisy, others = (values(rows, name)["fd_mobilenet"] for name in found)
    # Measured: 121, 200 and 719.
    assert 1.1 * faces < noisy < 0.6 * others


# Mistakes.


def test_statistics_that_do_not_fit_are_refused(sets, tmp_path, light_features):
    rng = np.random.default_rng(0)
    few = np.cov(rng.standard_normal((7, 50)))
    of_7 = write_npz(tmp_path / "of_7.npz", mu=np.zeros(7), sigma=few)
    fitting = {"pool": measure.FeatureStats.of(rng.standard_normal((50, 16)))}
    about = {"features": "inception", "protocol": "tf", "image_size": 16}
    about["extractor"] = light("inception").fingerprint
    made = {}
    for name, change in {
        "size": {"image_size": 32},
        "protocol": {"protocol": "clean"},
        "features": {"features": "mobilenet"},
        "weights": {"extractor": "0123456789ab"},
    }.items():
        made[name] = tmp_path / f"{name}.npz"
        statistics.write(made[name], **fitting, about=about | change)
    (tmp_path / "cut.npz").write_bytes(of_7.read_bytes()[:100])
    refused = {
        of_7: "are of 7 features, inception gives 16",
        made["size"]: "is of pictures of 32 pixels, the samples have 16",
        made["protocol"]: "protocol clean, not of inception, protocol tf",
        made["features"]: "statistics of mobilenet",
        made["weights"]: "other weights of inception",
        tmp_path / "cut.npz": "no whole .npz",
        write_npz(tmp_path / "other.npz", weights=few): "holds weights, but no mu and sigma",
        write_npz(tmp_path / "half.npz", mu=np.zeros(7)): "no mu and sigma",
        tmp_path / "nothing.npz": "is not there|is no file",
        write_npz(tmp_path / "small.npz", arr_0=patches(20, 0, 8)): "not 16 × 16|of one size",
        write_folder(tmp_path / "few", patches(3, 0)): "3 pictures are too few",
    }
    for path, words in refused.items():
        plan = checked(plan_of([sets / "samples" / "folder"], path, tmp_path / "out"))
        with pytest.raises(UserError, match=words) as told:
            sweep.run(plan)
        assert "\n" not in str(told.value)
    assert not (tmp_path / "out" / "results.csv").exists()


def test_samples_of_other_sizes_are_refused(sets, tmp_path, light_features):
    mixed = write_folder(tmp_path / "mixed", patches(3, 0))
    PIL.Image.new("RGB", (20, 20)).save(mixed / "large.png")
    for samples, words in (
        ([mixed], "--image_size"),
        ([sets / "samples" / "folder", write_folder(tmp_path / "s", patches(3, 0, 8))], "one size"),
    ):
        with pytest.raises(UserError, match=words):
            sweep.run(checked(plan_of(samples, sets / "real" / "folder", tmp_path / "out")))


def test_a_network_that_gives_nan_is_refused_and_leaves_no_row(tmp_path, light_features):
    run = export(tmp_path / "run", scale=float("nan"))
    real = write_npz(tmp_path / "real.npz", arr_0=patches(20, 0, size=8))
    plan = plan_of([], real, tmp_path / "out", workdir=(str(run),), num_samples=20, steps=(1,))
    with pytest.raises(UserError, match="20 of 20 samples are not finite"):
        sweep.run(checked(plan))
    assert not list((tmp_path / "out" / "cells").glob("run*.json"))


def test_a_number_of_samples_below_that_of_features_is_warned_about(
    sets, tmp_path, light_features, capsys
):
    def warned(n: int) -> list[str]:
        reference = sets / "real" / "folder"
        evaluated(plan_of([sets / "real" / "npz.npz"], reference, tmp_path, num_samples=n))
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        return [line for line in lines if line.startswith("warning")]

    (line,) = warned(16)
    assert "N = 16 samples are too few for the 16 features of inception" in line
    assert line.split("warning: ")[1] in (tmp_path / "results.md").read_text()
    assert warned(17) == []


def test_a_missing_file_of_weights_is_told_in_one_line(sets, tmp_path):
    flags = {"samples": sets / "samples" / "folder", "reference": sets / "real" / "folder"}
    flags |= {"weights": tmp_path / "none.safetensors", "out": tmp_path}
    words = [sys.executable, ROOT / "eval_fid.py", *(f"--{k}={v}" for k, v in flags.items())]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "none.safetensors does not exist" in line
