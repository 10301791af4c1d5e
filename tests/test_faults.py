"""Faults of a real training process: killed at any time, asked to stop, on a disk that is full."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from tests.conftest import THOROUGH, thorough
from tests.forked import Commands, Done
from tests.test_checkpoint import needs_small_disks
from utils.checkpoint import Checkpoints, check

ROOT = pathlib.Path(__file__).parents[1]
STEPS, INTERVAL = (600 if THOROUGH else 240), 10
WORDS = [
    *("train_meanflow.py", "--config=configs/toy.py:two_moons", "--batch_size=64"),
    *("--model.hidden_size=64", "--model.depth=2", "--optimizer.warmup_steps=0"),
    *(f"--max_steps={STEPS}", f"--save_interval={INTERVAL}", "--log_interval=1"),
    *("--eval_interval=100000", "--sample.steps=(1,)", "--sample.num=4"),
]
KILLS = 20 if THOROUGH else 4


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands() as commands:
        yield commands


def words_for(workdir: pathlib.Path) -> list[str]:
    return [*WORDS, f"--workdir={workdir}"]


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of finished checkpoints, as they lie there."""
    names = os.listdir(workdir / "checkpoints") if (workdir / "checkpoints").exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """All of the newest checkpoint, by path; its checksums are checked."""
    with Checkpoints(workdir) as checkpoints:
        whole = checkpoints._orbax.load_checkpointables(checkpoints.latest)
        assert whole.keys() == {"ema", "train"}
        stored = checkpoints._orbax.checkpointables_metadata(checkpoints.latest).custom_metadata
        assert stored["checksums"].keys() == whole.keys()
        check(stored, whole)
    leaves = jax.tree_util.tree_flatten_with_path(whole)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def uninterrupted(commands, tmp_path_factory) -> dict[str, np.ndarray]:
    """What the command gives when nothing happens to it."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    result = commands(words_for(workdir), ROOT)
    assert result.returncode == 0, result.stderr
    assert saved_steps(workdir) == [STEPS - INTERVAL, STEPS]
    return arrays(workdir)


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys() and len(a) > 20
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def struck(
    commands: Commands, workdir: pathlib.Path, number: int, when: Callable[[], bool], delay: float
) -> tuple[Done, list[int]]:
    """Runs the command, sends a signal `delay` seconds after `when()`; says what was saved then."""
    process = commands.start(words_for(workdir), ROOT)
    end = time.monotonic() + 30
    while not when() and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(delay)
    there = saved_steps(workdir)
    os.kill(process, number)
    return commands.done(), there


def last_line(workdir: pathlib.Path) -> int:
    """The last step in the log, of lines that are whole."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def test_kills_lose_no_checkpoint_and_only_the_steps_since_the_last(
    commands, uninterrupted, tmp_path
):
    """Every other kill falls into a save, which is known by its folder; the others anywhere."""
    rng, workdir = random.Random(0), tmp_path / "run"
    inside = 0
    for trial in range(KILLS):
        before = saved_steps(workdir)[-1:] or [0]
        seen = last_line(workdir)
        during = trial % 2 == 0

        def half_written() -> bool:
            place = workdir / "checkpoints"
            return place.exists() and any("tmp" in name for name in os.listdir(place))

        def goes_on(seen=seen) -> bool:
            return last_line(workdir) not in (0, seen)

        when, delay = (
            (half_written, rng.uniform(0, 0.03)) if during else (goes_on, rng.random() / 20)
        )
        result, there = struck(commands, workdir, signal.SIGKILL, when, delay)
        assert result.returncode == -signal.SIGKILL, result.stderr
        inside += half_written()
        after = saved_steps(workdir)
        assert after[-1:] >= there[-1:] >= [s for s in before if s]
        if after:
            whole = arrays(workdir)  # checksums and all
            assert int(whole["['train']['step']"]) == after[-1]
    print(f"{KILLS} kills, {inside} of them inside a save")  # shown by pytest -rP
    assert inside >= 1
    assert commands(words_for(workdir), ROOT).returncode == 0
    assert_same(arrays(workdir), uninterrupted)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    logged = [step for step in steps if step < STEPS]
    assert logged == list(range(1, STEPS))  # none twice, none missing


def test_sigterm_saves_and_the_same_command_goes_on(commands, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    result, _ = struck(commands, workdir, signal.SIGTERM, lambda: last_line(workdir) > 20, 0.01)
    assert result.returncode == 75, result.stderr
    step = saved_steps(workdir)[-1]
    assert step > 20 and f"saved at step {step} after SIGTERM" in result.stderr.splitlines()[-1]
    assert commands(words_for(workdir), ROOT).returncode == 0
    assert_same(arrays(workdir), uninterrupted)


FILL = """
mount -t tmpfs -o size=8m none "$1" || exit 99
cd "$2"; shift 2
"$@" &
pid=$!
until grep -q '"step": 40' "$DIR/run/metrics.jsonl" 2>/dev/null; do
    kill -0 $pid || exit 98
    sleep 0.01
done
while head -c 100000 /dev/zero >> "$DIR/ballast"; do :; done 2>/dev/null
sleep 1
rm "$DIR/ballast"
wait $pid || exit $?
rm -rf "$OUT"
cp -r "$DIR/run" "$OUT"
"""


@thorough
@needs_small_disks
def test_a_full_disk_in_mid_run_costs_saves_and_no_steps(uninterrupted, tmp_path):
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    words = [sys.executable, *words_for(disk / "run")]
    result = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", FILL, "sh", str(disk), str(ROOT), *words],
        env={**os.environ, "DIR": str(disk), "OUT": str(out)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert "could not be saved (No space left on device)" in result.stderr
    assert_same(arrays(out), uninterrupted)
