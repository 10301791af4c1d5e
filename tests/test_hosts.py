"""An evaluation on two real processes that make one program, against one process."""

import csv
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
# What eval_fid.py does, in a program of several processes, with a classifier of a few steps.
DRIVER = """
import sys
import jax
out, port, count, index = sys.argv[1], *map(int, sys.argv[2:])
if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
from pipelines import classifier, groups, report, sweep
from pipelines.plan import Plan, checked
train = classifier.extractor
groups.classifier.extractor = lambda *given: train(*given, classifier.Recipe(steps=20))
plan = checked(Plan(
    workdir=["pretrained/digits_mean_flow"], features=("classifier",), steps=(1, 2),
    metrics=("fid", "kid", "pr", "nearest"), num_samples=50, batch_size=20, bootstrap=3,
    out=out, cache_dir=out + "/cache", save_samples="npz",
))
sections = sweep.run(plan)
assert bool(sections) == (index == 0)
if sections:
    report.write(sections, plan)
print("devices", jax.device_count())
"""


def start(out: pathlib.Path, port: int, count: int, index: int) -> subprocess.Popen:
    devices = f"--xla_force_host_platform_device_count={4 // count}"
    environment = {**os.environ, "XLA_FLAGS": devices, "PJRT_NPROC": "32"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *map(str, (out, port, count, index))],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(processes: list[subprocess.Popen]) -> None:
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:  # one that failed leaves the other waiting
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
        assert "devices 4" in output


def rows_of(out: pathlib.Path) -> list[dict]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_processes_give_the_rows_and_pictures_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    finished([start(tmp_path / "one", port, 1, 0)])
    finished([start(tmp_path / "two", port, 2, index) for index in range(2)])
    one, two = (rows_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) > 10
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(float(a.pop("value")), float(b.pop("value")), rtol=1e-4)
        deviations = [float(row.pop("deviation") or 0) for row in (a, b)]
        np.testing.assert_allclose(*deviations, rtol=1e-3)
        assert a == b
    places = [sorted((tmp_path / name / "samples").iterdir()) for name in ("one", "two")]
    assert [p.name for p in places[0]] == [p.name for p in places[1]]
    for a, b in zip(*places, strict=True):
        pictures = [np.load(path)["arr_0"].astype(int) for path in (a, b)]
        assert pictures[0].shape == (50, 8, 8, 3)
        assert np.abs(pictures[0] - pictures[1]).max() <= 1  # rounding of the last bit at most
