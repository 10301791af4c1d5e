"""Several real processes that make one program: evaluation, training torn apart, signals."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import psutil
import pytest

from pipelines.flow import FlowPipeline
from pipelines.stored import NO_EMA
from tests.conftest import THOROUGH, thorough
from tests.programs import LOST_AFTER, ROOT, Program, free_port, own_lines
from tests.small import write_pictures
from utils import hosts
from utils.cli import UserError

# What eval_fid.py does, in a program of several processes, with a classifier of a few steps.
DRIVER = """
from utils import cli, hosts
cli.define_flags(hosts.Hosts)
OUT = cli.flags.DEFINE_string("out", "", "folder")
def main(_):
    hosts.join(cli.read_flags(hosts.Hosts))
    evaluate(OUT.value)
def evaluate(out):
    import jax
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
    assert bool(sections) == hosts.first()
    if sections:
        report.write(sections, plan)
    print("devices", jax.device_count())
cli.run(main)
"""
# A program whose processes add something up again and again; one may do something else first.
SUMS = """
import contextlib, sys, time
from utils import cli, hosts
cli.define_flags(hosts.Hosts)
DO = cli.flags.DEFINE_string("do", "", "what process `who` does")
WHO = cli.flags.DEFINE_integer("who", 0, "process")
@contextlib.contextmanager
def waits():  # as saving does, for all hosts
    try:
        yield
    finally:
        time.sleep(600)
def main(_):
    hosts.join(cli.read_flags(hosts.Hosts))
    import jax
    from utils.sharding import agreed
    agreed(1)
    import warnings
    warnings.warn("told once")
    print("runs", flush=True)
    if DO.value == "count":
        devices = f"{jax.local_device_count()} of {jax.device_count()}"
        return print(f"processes {jax.process_count()}, devices {devices}")
    with waits(), hosts.Preemption():
        if DO.value == "mistake" and jax.process_index() == WHO.value:
            raise cli.UserError("the disk of this host is full")
        if DO.value == "bug" and jax.process_index() == WHO.value:
            raise ZeroDivisionError("a bug")
        if DO.value == "again" and jax.process_index() == WHO.value:
            raise hosts.Again("this host cannot save: the same command goes on")
        while True:
            agreed(1)
            time.sleep(0.05)
cli.run(main)
"""
TRAIN = (
    *("train_meanflow.py", "--mean_flow.omega", "2", "--mesh.fsdp", "2", "--batch_size", "16"),
    *("--model.depth", "2", "--model.hidden_size", "96", "--model.num_heads", "2"),
    *("--max_steps", "60", "--save_interval", "5", "--keep_checkpoints", "100"),
    *("--log_interval", "1", "--optimizer.warmup_steps", "5"),
    *("--sample.num", "8", "--sample.steps", "(1,)"),
)


def rows_of(out: pathlib.Path) -> list[dict]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_processes_give_the_rows_and_pictures_of_one(tmp_path):
    command = ["-c", DRIVER, f"--out={tmp_path}/{{}}"]
    for name, count in (("one", 1), ("two", 2)):
        words = [word.format(name) for word in command[2:]]
        with Program([*command[:2], *words], tmp_path / f"{name}_log", count, devices=4) as program:
            assert [program.ends(i, 200) for i in range(count)] == [0] * count, program.told()
            logs = tmp_path / f"{name}_log"
            assert all("devices 4" in (logs / f"stdout_{i}").read_text() for i in range(count))
    one, two = (rows_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) > 10
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(float(a.pop("value")), float(b.pop("value")), rtol=1e-4)
        deviations = [float(row.pop("deviation") or 0) for row in (a, b)]
        np.testing.assert_allclose(deviations[0], deviations[1], rtol=1e-3)
        assert a == b
    places = [sorted((tmp_path / name / "samples").iterdir()) for name in ("one", "two")]
    assert [p.name for p in places[0]] == [p.name for p in places[1]]
    for a, b in zip(*places, strict=True):
        pictures = [np.load(path)["arr_0"].astype(int) for path in (a, b)]
        assert pictures[0].shape == (50, 8, 8, 3)
        assert np.abs(pictures[0] - pictures[1]).max() <= 1  # rounding of the last bit at most


# Training on two processes, torn apart.


def train(run: pathlib.Path, log: str, count: int) -> Program:
    return Program([*TRAIN, f"--workdir={run}"], run.parent / f"{run.name}_{log}", count)


def saved(run: pathlib.Path) -> list[int]:
    """The steps of the checkpoints that are whole, in order."""
    return sorted(int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit())


def logged(run: pathlib.Path) -> dict[int, float]:
    """The error of each step whose line is whole."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["error"] for row in rows if "error" in row}


def checksums(run: pathlib.Path, step: int) -> dict:
    """Of every array of a checkpoint, the optimizer's too."""
    path = run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    return json.loads(path.read_text())["custom_metadata"]["checksums"]


def kill(program: Program, index: int) -> None:
    os.killpg(program.processes[index].pid, signal.SIGKILL)


def new_save(run: pathlib.Path, program: Program) -> None:
    """Waits for a checkpoint that was not there."""
    before = saved(run)[-1:]
    program.until(lambda: saved(run)[-1:] > before)


def new_line(run: pathlib.Path, program: Program) -> None:
    """Waits for a step beyond the last checkpoint, so that the loop runs."""
    steps = set(logged(run)) | {saved(run)[-1]}
    program.until(lambda: max(logged(run)) > max(steps))


def distance(run: pathlib.Path, other: pathlib.Path, ema: str) -> float:
    """Of the final parameters, in relative norm."""
    a, b = (FlowPipeline.from_pretrained(path, ema=ema).params for path in (run, other))
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0]))


@thorough
@pytest.mark.timeout(900)  # some 140 s on two cores
def test_two_processes_are_killed_and_go_on_as_one_and_as_two(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    with train(whole, "log", 2) as program:
        assert [program.ends(i) for i in range(2)] == [0, 0], program.told()
        assert own_lines(program.stderr(1)) == []  # one process speaks

    with train(torn, "one_killed", 2) as program:
        new_save(torn, program)
        kill(program, 1)
        start = time.monotonic()
        assert program.ends(0, LOST_AFTER + 20) == hosts.LOST, program.told()
        print(f"the other ended {time.monotonic() - start:.1f} s after the SIGKILL")
        assert "another host stopped or was lost" in own_lines(program.stderr(0))[-1]
    if THOROUGH:
        with train(torn, "both_killed", 2) as program:
            new_save(torn, program)
            kill(program, 0)
            kill(program, 1)
    steps = saved(torn)
    assert len(steps) >= 1 + THOROUGH
    for step in steps:  # bit for bit, as the number of processes was the same all along
        assert checksums(torn, step) == checksums(whole, step)

    if THOROUGH:
        with train(torn, "alone", 1) as program:
            new_line(torn, program)
            program.processes[0].send_signal(signal.SIGTERM)
            assert program.ends(0) == hosts.PREEMPTED, program.told()
            assert f"saved at step {saved(torn)[-1]} after SIGTERM" in program.stderr(0)
    with train(torn, "told", 2) as program:
        new_line(torn, program)
        program.processes[1].send_signal(signal.SIGTERM)
        assert [program.ends(i) for i in range(2)] == [hosts.PREEMPTED] * 2, program.told()
        assert f"saved at step {saved(torn)[-1]} after SIGTERM" in program.stderr(0)
        assert own_lines(program.stderr(1)) == []
    assert saved(torn)[-1] < 60
    with train(torn, "rest", 2) as program:
        assert [program.ends(i) for i in range(2)] == [0, 0], program.told()

    assert saved(torn)[-1] == saved(whole)[-1] == 60
    errors, others = logged(whole), logged(torn)
    assert list(errors) == list(others) == list(range(1, 61))  # nothing twice, nothing left out
    np.testing.assert_allclose(list(errors.values()), list(others.values()), rtol=1e-3)
    for ema in ("", NO_EMA):
        assert distance(whole, torn, ema) < 1e-4


# Errors and signals of one process.


def sums(folder: pathlib.Path, *words: str) -> Program:
    return Program(["-c", SUMS, *words], folder, 2)


def running(program: Program) -> None:
    paths = [path.with_name(path.name.replace("err", "out")) for path in program.errors]
    program.until(lambda: all("runs" in path.read_text() for path in paths))


@pytest.mark.parametrize(
    ("what", "who", "status", "line"),
    [
        ("mistake", 0, 2, "error: the disk of this host is full"),
        ("mistake", 1, 2, "error: the disk of this host is full"),
        ("bug", 1, 1, "ZeroDivisionError: a bug"),
        ("again", 1, hosts.LOST, "this host cannot save: the same command goes on"),
    ],
)
def test_an_error_on_one_host_ends_all(tmp_path, what, who, status, line):
    with sums(tmp_path, f"--do={what}", f"--who={who}") as program:
        assert program.ends(who) == status, program.told()
        start = time.monotonic()
        assert program.ends(1 - who) == hosts.LOST, program.told()
        assert time.monotonic() - start < LOST_AFTER + 20
    assert own_lines(program.stderr(who))[-1] == line
    if what == "mistake":
        told = [text for text in own_lines(program.stderr(who)) if "told once" not in text]
        assert told == [line]
    assert "another host stopped or was lost" in own_lines(program.stderr(1 - who))[-1]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (hosts.Again("a save failed on one host: the same command goes on"), 76, "a save failed"),
        (ConnectionResetError(104, "Connection reset by peer"), 76, "another host stopped"),
        (RuntimeError("Gloo allreduce failed: Connection closed by peer"), 76, "another host"),
        (UserError("no such bucket: connection refused"), 2, "error: no such bucket"),
        (FileNotFoundError(2, "No such file", "peer"), 2, "error: [Errno 2] No such file"),
        (ZeroDivisionError("a bug"), None, ""),
    ],
)
def test_what_ends_a_process_gives_a_line_and_a_status(capsys, error, status, line):
    assert hosts._reported(error) == status
    told = capsys.readouterr().err
    assert told.startswith(line) and told.count("\n") == bool(line)


def test_what_goes_on_ends_a_process_alone_with_the_status_of_a_lost_host(capsys):
    def main():
        raise hosts.Again("saving failed here: the same command goes on")

    with pytest.raises(SystemExit) as stop:
        hosts.ended(main)
    assert stop.value.code == hosts.LOST
    assert capsys.readouterr().err == "saving failed here: the same command goes on\n"


def test_sigterm_ends_a_program_that_saves_nothing(tmp_path):
    with sums(tmp_path) as program:
        running(program)
        program.processes[1].send_signal(signal.SIGTERM)
        assert program.ends(1) == 128 + signal.SIGTERM, program.told()
        assert program.ends(0) == hosts.LOST, program.told()


# Two processes meet a folder that they do not share, a chunk that one of them cannot read, and a
# disk that is full for one of them.
FAULTS = """
import os, pathlib, resource
from utils import cli, hosts
cli.define_flags(hosts.Hosts)
OUT = cli.flags.DEFINE_string("out", "", "folder")
def main(_):
    hosts.join(cli.read_flags(hosts.Hosts), saves=True)
    import jax, jax.numpy as jnp
    from etils import epath
    from pipelines.train import check_shared
    from utils.checkpoint import Checkpoints
    from utils.sharding import abstract_state, agreed, born_sharded, make_mesh
    me, mesh, out = jax.process_index(), make_mesh(1, 2), pathlib.Path(OUT.value)

    def told(call, *given):
        try:
            return call(*given)
        except cli.UserError as error:
            print(error)

    for folder in (out / f"of_{me}", out):
        folder.mkdir(exist_ok=True)
        told(check_shared, epath.Path(folder))

    def init(number):
        return {"w": number + jax.random.normal(jax.random.key(0), (256, 512))}

    parts = {"train": abstract_state(lambda: init(0), mesh)}
    with hosts.Preemption(), Checkpoints(out, keep=9) as checkpoints:
        for step in (1, 2):
            checkpoints.save_now(step, {"train": born_sharded(lambda: init(step), mesh)})
        if me == 1:
            chunks = (out / "checkpoints" / "2").glob("**/ocdbt.process_1/d/*")
            os.truncate(max(chunks, key=lambda path: path.stat().st_size), 1000)
        agreed(0)
        told(checkpoints.restore, parts, 2)
        w = checkpoints.restore_newest(parts)["train"]["w"]
        print("back at", round(float(jnp.mean(w))), "of", checkpoints.steps, flush=True)
        if me == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        checkpoints.save(3, {"train": born_sharded(lambda: init(3), mesh)})
        print("saving", flush=True)
        checkpoints.settle()
cli.run(main)
"""


def test_what_fails_on_one_host_holds_up_no_other(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with Program(["-c", FAULTS, f"--out={out}"], tmp_path, 2) as program:
        stdouts = [tmp_path / f"stdout_{i}" for i in range(2)]
        program.until(lambda: all("saving" in path.read_text() for path in stdouts))
        start = time.monotonic()
        assert [program.ends(i, 40) for i in range(2)] == [hosts.LOST] * 2, program.told()
        print(f"ended {time.monotonic() - start:.1f} s after the save began")
    for i, path in enumerate(stdouts):
        shared, damage, back, _ = path.read_text().splitlines()[-4:]  # Gloo's come first
        assert f"of_{i} is another folder on another host" in shared
        assert "checkpoints/2 cannot be read" in damage
        assert ("on another host" in damage) == (i == 0)
        assert back == "back at 1 of (1,)"
        last = own_lines(program.stderr(i))[-1]
        assert last.startswith("checkpoint 3 could not be saved") and "the same command" in last
    assert "checkpoint 2 is damaged: moved to" in program.stderr(0)
    assert saved(out) == [1]


# A parent and its worker, without JAX.
WAITS = """
import os, time
from utils import hosts
hosts._attend(hosts.Hosts())
print("runs", os.environ.get(hosts._LINE), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_parent_hands_signals_on_and_its_worker_no_line_to_children(number):
    with subprocess.Popen(
        [sys.executable, "-c", WAITS], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout and parent.stdout.readline() == "runs None\n"
        parent.send_signal(number)  # to it alone
        assert parent.wait(20) == 128 + number


def test_a_signal_before_the_worker_runs_is_handed_on(monkeypatch):
    sent = []

    class Worker:
        def __init__(self, *_, **__):
            os.kill(os.getpid(), signal.SIGTERM)

        def send_signal(self, number):
            sent.append(number)

        def wait(self):
            return -signal.SIGTERM

    monkeypatch.setattr(subprocess, "Popen", Worker)
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert hosts._wait_for_worker(hosts.Hosts()) == 128 + signal.SIGTERM
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    assert sent == [signal.SIGTERM]


@pytest.mark.parametrize(
    ("status", "said", "expected", "line"),
    [
        (0, b"jJ", 0, ""),
        (2, b"jJT\2", 2, ""),
        (-signal.SIGABRT, b"jJT\2", 2, ""),  # after its line
        (3, b"jJ", 3, ""),  # sys.exit(3) is no lost host
        (-signal.SIGABRT, b"jJ", hosts.LOST, "SIGABRT, mostly because another host stopped"),
        (-signal.SIGSEGV, b"jJ", 128 + signal.SIGSEGV, "ended by SIGSEGV"),
        (-signal.SIGABRT, b"j", 2, "not all of the expected processes met"),
    ],
)
def test_what_became_of_a_worker_is_explained(capsys, status, said, expected, line):
    assert hosts._explained(hosts.Hosts(), status, said) == expected
    told = capsys.readouterr().err
    assert line in told and bool(told) == bool(line)


def test_a_worker_ends_with_its_parent(tmp_path):
    with sums(tmp_path) as program:
        running(program)
        parent = psutil.Process(program.processes[1].pid)
        (worker,) = parent.children()
        parent.kill()  # it alone
        worker.wait(10)
        assert program.ends(0) == hosts.LOST, program.told()


def test_a_worker_that_is_killed_is_told(tmp_path):
    with sums(tmp_path) as program:
        running(program)
        (worker,) = psutil.Process(program.processes[0].pid).children()
        worker.kill()  # as for lack of memory
        assert program.ends(0) == 128 + signal.SIGKILL
        assert "ended by SIGKILL" in program.stderr(0)
        assert "told once" in program.stderr(0)
        assert "told once" not in program.stderr(1)
        assert program.ends(1) == hosts.LOST, program.told()


def test_a_coordinator_that_cannot_be_reached_is_told(tmp_path):
    flags = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--process_id=1"]
    done = subprocess.run(
        [sys.executable, "train_flow.py", *flags, "--join_timeout=2", f"--workdir={tmp_path}/run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: not all of the 2 processes met at the coordinator")
    assert not (tmp_path / "run").exists()


def test_two_processes_prepare_what_one_does(tmp_path):
    source = write_pictures(tmp_path / "pictures", 20)
    words = ["--autoencoder=none", "--image_size=16", "--shard_size=3", "--batch_size=4"]
    told = {}
    for name, count in (("one", 1), ("two", 2)):
        command = ["prepare_data.py", f"--source={source}", f"--out={tmp_path / name}", *words]
        with Program(command, tmp_path / f"log_{name}", count) as program:
            assert [program.ends(i) for i in range(count)] == [0] * count, program.told()
        told[name] = [(tmp_path / f"log_{name}" / f"stdout_{i}").read_text() for i in range(count)]
    assert "is complete: 20 pictures" in told["two"][0]
    assert "complete" not in told["two"][1]
    cards = [json.loads((tmp_path / name / "card.json").read_text()) for name in ("one", "two")]
    assert cards[0] == cards[1]
    assert cards[0]["complete"]


# Which process this is, by flags and by surroundings.

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
}


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        ({}, {}, None),
        ({}, {"distributed": "on"}, {}),
        (SLURM, {}, {"local_device_ids": []}),  # one task on each node: all of its devices
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, {}, {}),  # JAX's rule: one device for each
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, {}, None),
        (SLURM, {"distributed": "off"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, {}, None),  # a shell of salloc, no step
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, {}, None),
    ],
)
def test_processes_are_found_by_their_surroundings(monkeypatch, environment, options, expected):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "TPU")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts.arguments(hosts.Hosts(**options)) == expected


def test_tasks_of_slurm_find_each_other(tmp_path):
    """SLURM's variables as srun sets them, two tasks on two nodes that are both this machine."""
    step = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    step |= {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost,other"}
    tasks = [step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": "0"} for i in range(2)]
    with Program(["-c", SUMS, "--do=count"], tmp_path, 2, 4, surroundings=tasks) as program:
        assert [program.ends(i) for i in range(2)] == [0, 0], program.told()
    for i in range(2):
        assert "processes 2, devices 2 of 4" in (tmp_path / f"stdout_{i}").read_text()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("h:1", 0, -1), "go together"),
        (("h:1", 2, -1), "go together"),
        (("", 2, 0), "go together"),
        (("h", 2, 0), "give HOST:PORT"),
        (("h:x", 2, 0), "give HOST:PORT"),
        (("h:99999", 2, 0), "give HOST:PORT"),
        (("h:1", 2, 2), "the 2 processes are 0 to 1"),
        (("h:1", 2, 0, "auto", 0), "--join_timeout=0: seconds"),
        (("h:1", 2, 0, "auto", 9, -1), "--lost_after=-1: seconds"),
    ],
)
def test_half_a_set_of_flags_is_told(options, line):
    with pytest.raises(UserError, match=line):
        hosts.arguments(hosts.Hosts(*options))


def test_given_flags_win_over_the_surroundings(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    found = hosts.arguments(hosts.Hosts("10.0.0.1:8476", 2, 1)) or {}
    assert found["coordinator_address"] == "10.0.0.1:8476"
    assert (found["num_processes"], found["process_id"]) == (2, 1)


def test_sigterm_is_noticed_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with hosts.Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(2)
        assert preemption.reached(3)
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_stays_light_does():
    program = "import sys; from utils import cli, hosts; print([m for m in sys.modules if m in"
    program += " ('jax', 'numpy', 'orbax')])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
