"""benchmarks/tpu_compile.py: what a program of several chips keeps, computes and sends.

On virtual devices always; by the TPU's compiler where libtpu is installed (`make topologies`).
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

from tests.conftest import thorough

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = ("--config=configs/imagenet256.py:meanflow_xl2", "--model.size=S/4", "--model.depth=2")
SMALL = 2**14  # bytes: metrics, and norms of gradients
needs_libtpu = pytest.mark.skipif(
    not (os.environ.get("TOPOLOGIES") and importlib.util.find_spec("libtpu")),
    reason="by the TPU's compiler: make topologies",
)
TOPOLOGIES = ["cpu:4", pytest.param("v5e:2x2", marks=needs_libtpu)]


def command(*options: str) -> subprocess.CompletedProcess:
    """Runs the script on a small network."""
    script = [sys.executable, "benchmarks/tpu_compile.py", *RECIPE, *options]
    return subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=280)


@functools.cache
def results(topology: str, *options: str) -> tuple[dict[str, dict], str]:
    """What is measured, by program, and what is written to the terminal."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "results.jsonl"
        done = command(f"--topology={topology}", f"--json={path}", *options)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["what"]: row for row in rows}, done.stdout + done.stderr


def guided(topology: str) -> dict[str, dict]:
    """A step and a guided sampler on four devices, state split over all of them."""
    options = ("--mesh.fsdp=4", "--batch_size=32", "--what=step,sampler", "--sample.guidance=2")
    return results(topology, *options)[0]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_only_parameters_and_gradients_cross_between_devices(topology):
    found = guided(topology)["step"]
    whole = found["bytes"]["parameters"] * 4  # but for what is too small to split
    by = {(row["kind"], row["fsdp"]): row for row in found["collectives"]}
    others = {key: row["largest"] for key, row in by.items() if not key[1]}
    assert all(size < SMALL for size in others.values()), others
    assert {kind for kind, _ in by} <= {"all-gather", "all-reduce", "reduce-scatter"}
    # Each parameter is gathered once, in float32 or as the products round it; each gradient summed.
    assert 0.45 * whole < by["all-gather", True]["bytes"] <= whole
    assert 0.8 * whole < by["reduce-scatter", True]["bytes"] <= whole


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_drawing_samples_moves_nothing_between_devices(topology):
    """Guidance doubles the batch, each device its own part."""
    assert guided(topology)["sampler"]["collectives"] == []


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_new_state_takes_the_place_of_the_old_one(topology):
    sizes = guided(topology)["step"]["bytes"]
    state = sizes["parameters"] + sizes["ema"] + sizes["optimizer"]
    assert sizes["ema"] == sizes["parameters"]
    assert sizes["optimizer"] == pytest.approx(2 * sizes["parameters"], abs=64)
    assert -sizes["aliased"] >= state
    assert sizes["outputs"] + sizes["aliased"] < SMALL
    assert sizes["sum"] == sum(size for kind, size in sizes.items() if kind != "sum")


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_sample_is_computed_once(topology):
    """FLOPs of all devices, as the program runs, are those of the model on the whole batch."""
    found = guided(topology)["step"]
    assert found["flops"] == pytest.approx(found["model_flops"], rel=0.01)


@thorough
def test_one_sample_per_device_is_computed_in_the_plain_form_with_one_warning():
    found, written = results("cpu:8", "--batch_size=8")
    assert written.count("warning: ") == 1
    assert "warning: 1 samples per device and microbatch are no multiple of 4" in written
    assert found["step"]["mesh"] == {"data": 8, "fsdp": 1}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--topology=v9:2x2", "error: --topology=v9:2x2: as v5e:2x2, of v4, v5e, v5p, v6e, or"),
        ("--topology=cpu:0", "error: --topology=cpu:0: as v5e:2x2"),
        ("--what=training", "error: --what=training: of step, sampler, decoder, inception"),
        ("--table=nothing.jsonl", "error: --table=nothing.jsonl: no file of results"),
        ("--dataset_name=digits", "error: dataset_name=digits: of imagenet256, celebahq256"),
        pytest.param("--topology=v5e:3x9", "error: --topology=v5e:3x9: there is none such",
                     marks=needs_libtpu),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(option, message):
    topology = [] if "topology" in option else ["--topology=cpu:1"]
    done = command(option, *topology)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(message)
    assert "Traceback" not in done.stderr


def test_the_tables_in_the_docs_are_those_of_the_results_beside_them():
    done = command("--table=docs/devices.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
