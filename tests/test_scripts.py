"""The scripts for pods, SLURM and GPU nodes, on a machine that has none of them: fakes on the PATH
write down how they are called and refuse what the real commands do not know.
"""

import os
import pathlib
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ("again", "gpu_node", "slurm_fid", "slurm_train", "tpu_pod")
POD = {"NAME": "pod", "ZONE": "here-1", "TYPE": "v6e-16"}
TRAIN = ["train_meanflow.py", "--config=configs/digits.py", "--sample.steps", "(1, 2)"]
# What the SDK's reference (cloud.google.com/sdk/gcloud/reference/compute/tpus) knows, of what we
# could ask for.
GCLOUD = {
    "tpu-vm create": {"--accelerator-type", "--version", "--spot"},
    "tpu-vm ssh": {"--worker", "--command"},
    "tpu-vm scp": {"--worker", "--recurse"},
    "tpu-vm delete": {"--quiet"},
    "queued-resources create": {"--accelerator-type", "--runtime-version", "--node-id", "--spot"},
    "queued-resources delete": {"--force", "--quiet"},
}


def run(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    return subprocess.run(
        [interpreter(script), f"scripts/{script}.sh", *words],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def interpreter(script: str) -> str:
    return "bash" if script.startswith("slurm") else "sh"


def fake(folder: pathlib.Path, name: str, body: str = "") -> pathlib.Path:
    """A command that notes its arguments, one line a call, and then does `body`."""
    path = folder / name
    path.write_text(f'#!/bin/bash\nprintf "%q " "$@" | tr -d "\\n" >>"{path}.calls"\n')
    with path.open("a") as file:
        file.write(f'echo >>"{path}.calls"\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def calls(folder: pathlib.Path, name: str) -> list[list[str]]:
    path = folder / f"{name}.calls"
    return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []


def on_path(folder: pathlib.Path) -> dict[str, str]:
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def parsed(words: list[str]) -> None:
    """Parses a command line as the script of ours that it names would."""
    module = words[0].removesuffix(".py")
    program = f"import sys, {module}; from utils import cli; cli.parse(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_sound_and_teaches_its_use(script):
    for shell in ("bash", interpreter(script)):
        subprocess.run([shell, "-n", f"scripts/{script}.sh"], cwd=ROOT, check=True)
    told = run(script, "--help")
    assert told.returncode == 0
    assert told.stdout.startswith("usage: ")
    assert f"scripts/{script}.sh" in told.stdout
    assert run(script).stdout == told.stdout  # without a word too
    assert "set -eu" in (ROOT / f"scripts/{script}.sh").read_text()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here")
@pytest.mark.parametrize("script", [*SCRIPTS, "setup"])
def test_shellcheck_finds_nothing(script):
    subprocess.run(["shellcheck", f"scripts/{script}.sh"], cwd=ROOT, check=True)


# again.sh: 75 and 76 start it again, at most RETRIES times.


@pytest.mark.parametrize(
    ("statuses", "status", "starts"),
    [
        ("0", 0, 1),
        ("2", 2, 1),
        ("1", 1, 1),
        ("137", 137, 1),
        ("75 0", 0, 2),
        ("76 75 2", 2, 3),
        ("75 75 75 75 75", 75, 4),
    ],
)
def test_a_command_is_run_again_where_it_says_so(tmp_path, statuses, status, starts):
    body = f'set -- {statuses}; n=$(wc -l <"$0.calls"); exit "${{!n}}"'
    command = fake(tmp_path, "command", body)
    done = run("again", str(command), "a b", "--c=*", RETRIES="3", WAIT="0")
    assert done.returncode == status
    assert calls(tmp_path, "command") == [["a b", "--c=*"]] * starts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_reaches_the_command_and_ends_both(tmp_path, number):
    body = "trap 'exit 75' TERM; touch \"$0.runs\"; while :; do sleep 0.05; done"
    command = fake(tmp_path, "command", body)
    process = subprocess.Popen(["sh", "scripts/again.sh", str(command)], cwd=ROOT)
    while not (tmp_path / "command.runs").exists():
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert len(calls(tmp_path, "command")) == 1


def test_sigterm_in_the_pause_ends_it(tmp_path):
    command = fake(tmp_path, "command", "exit 76")
    with subprocess.Popen(
        ["sh", "scripts/again.sh", str(command)],
        cwd=ROOT,
        env=os.environ | {"WAIT": "1"},
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr and b"starting it again" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 76
    assert len(calls(tmp_path, "command")) == 1


# gpu_node.sh.


def test_a_gpu_node_runs_one_process_for_all_gpus(tmp_path):
    python = fake(tmp_path, "python")
    done = run("gpu_node", *TRAIN, PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    check, command = calls(tmp_path, "python")
    assert check[0] == "-c"
    assert command == [*TRAIN, "--distributed=off"]
    parsed(command)
    shown = run("gpu_node", "--dry-run", "train_flow.py", "--flip", PYTHON="py").stdout
    assert shown == "sh scripts/again.sh py train_flow.py --flip --distributed=off\n"


def test_a_gpu_node_without_cuda_is_told_what_to_install(tmp_path):
    python = fake(tmp_path, "python", f'exec {sys.executable} -S "$@"')  # sees no packages
    done = run("gpu_node", *TRAIN, PYTHON=str(python))
    assert done.returncode == 2
    assert "make setup EXTRAS=cuda" in done.stderr
    assert len(calls(tmp_path, "python")) == 1
    missing = run("gpu_node", *TRAIN, PYTHON=str(tmp_path / "none"))
    assert missing.returncode == 2 and "make setup" in missing.stderr


# SLURM.

JOB = {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": "py"}


@pytest.mark.parametrize(
    ("status", "environment", "requeued"),
    [
        (0, {}, False),
        (1, {}, False),
        (2, {}, False),
        (75, {}, True),
        (75, {"SLURM_RESTART_COUNT": "99"}, True),
        (75, {"SLURM_RESTART_COUNT": "100"}, False),
        (75, {"SLURM_RESTART_COUNT": "3", "REQUEUES": "3"}, False),
        (76, {}, False),  # at once: a mistake of one host
        (76, {"REQUEUE_AFTER": "0"}, True),
        (76, {"REQUEUE_AFTER": "0", "SLURM_RESTART_COUNT": "100"}, False),
    ],
)
def test_training_is_requeued_when_it_goes_on(tmp_path, status, environment, requeued):
    fake(tmp_path, "srun", f"exit {status}")
    fake(tmp_path, "scontrol")
    done = run("slurm_train", *TRAIN, **JOB | environment, **on_path(tmp_path))
    assert done.returncode == status, done.stderr
    (command,) = calls(tmp_path, "srun")
    assert command == ["--kill-on-bad-exit=0", "py", *TRAIN]
    assert calls(tmp_path, "scontrol") == [["requeue", "77"]] * requeued


def test_training_on_slurm_is_a_command_line_of_ours(tmp_path):
    shown = run("slurm_train", "--dry-run", *TRAIN[:2], PYTHON="py").stdout.split()
    parsed(shown[3:])


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (143, True)])
def test_an_evaluation_is_requeued_when_its_time_is_over(tmp_path, status, requeued):
    fake(tmp_path, "srun", f"exit {status}")
    fake(tmp_path, "scontrol")
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
    words = ["--out=runs/eval", "--workdir=a", "--workdir=b", "--steps=1,2"]
    done = run("slurm_fid", *words, **JOB, **array, **on_path(tmp_path))
    assert done.returncode == status, done.stderr
    (command,) = calls(tmp_path, "srun")
    assert command == ["py", "eval_fid.py", *words, "--distributed=off"]
    assert calls(tmp_path, "scontrol") == [["requeue", "70_3"]] * requeued
    parsed(command[1:])


@pytest.mark.parametrize("script", ["slurm_train", "slurm_fid"])
def test_a_cancelled_job_is_not_requeued(tmp_path, script):
    status = {"slurm_train": 75, "slurm_fid": 143}[script]
    fake(tmp_path, "srun", f'touch "$0.runs"; sleep 1; exit {status}')
    fake(tmp_path, "scontrol")
    process = subprocess.Popen(
        ["bash", f"scripts/{script}.sh", *TRAIN, "--out=x"],
        cwd=ROOT,
        env=os.environ | JOB | on_path(tmp_path),
    )
    while not (tmp_path / "srun.runs").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # as scancel does, to the script too
    assert process.wait(20) == status
    assert calls(tmp_path, "scontrol") == []


def test_slurm_is_asked_for_a_warning_in_time_and_for_one_task_per_node():
    options = {
        name: [
            line.removeprefix("#SBATCH ")
            for line in (ROOT / f"scripts/{name}.sh").read_text().splitlines()
            if line.startswith("#SBATCH ")
        ]
        for name in ("slurm_train", "slurm_fid")
    }
    train = {"--ntasks-per-node=1", "--signal=TERM@120", "--requeue", "--open-mode=append"}
    assert train <= set(options["slurm_train"])
    assert {"--ntasks=1", "--requeue"} <= set(options["slurm_fid"])
    shown = run("slurm_train", "--dry-run", *TRAIN[:2], PYTHON="py").stdout
    assert shown == f"srun --kill-on-bad-exit=0 py {' '.join(TRAIN[:2])}\n"


@pytest.mark.parametrize(
    ("script", "words", "line"),
    [
        ("slurm_train", TRAIN, "submit it: sbatch"),
        ("slurm_fid", ["--out=x"], "submit it: sbatch"),
        ("slurm_fid", ["--steps=1"], "give --out=FOLDER"),
        ("tpu_pod", ["create"], "NAME= of the slice is missing"),
    ],
)
def test_a_mistake_is_told_in_one_line(script, words, line):
    done = run(script, *words)
    assert done.returncode == 2
    assert line in done.stderr and done.stderr.count("\n") == 1


# TPU pods.


@pytest.mark.parametrize(
    ("words", "options", "expected"),
    [
        (
            ["create"],
            {},
            "tpu-vm create pod --version=v2-alpha-tpuv6e --accelerator-type=v6e-16 --zone=here-1",
        ),
        (
            ["create"],
            {"TYPE": "v5litepod-64", "SPOT": "1", "PROJECT": "lab"},
            "tpu-vm create pod --version=v2-alpha-tpuv5-lite --accelerator-type=v5litepod-64 "
            "--spot --zone=here-1 --project=lab",
        ),
        (
            ["create"],
            {"TYPE": "v4-32", "QUEUED": "1"},
            "queued-resources create pod --node-id=pod --runtime-version=tpu-ubuntu2204-base "
            "--accelerator-type=v4-32 --zone=here-1",
        ),
        (["ssh"], {}, "tpu-vm ssh pod --worker=0 --zone=here-1"),
        (["ssh", "3"], {}, "tpu-vm ssh pod --worker=3 --zone=here-1"),
        (
            ["log"],
            {},
            "tpu-vm ssh pod --worker=0 '--command=tail -n 50 -f flow/flow.log' --zone=here-1",
        ),
        (["delete"], {}, "tpu-vm delete pod --quiet --zone=here-1"),
        (["delete"], {"QUEUED": "1"}, "queued-resources delete pod --force --quiet --zone=here-1"),
    ],
)
def test_a_pod_is_asked_for_as_expected(tmp_path, words, options, expected):
    shown = run("tpu_pod", "--dry-run", *words, **POD | options).stdout
    assert shown == f"gcloud compute tpus {expected}\n"
    fake(tmp_path, "gcloud")
    assert run("tpu_pod", *words, **POD | options, **on_path(tmp_path)).returncode == 0
    (command,) = calls(tmp_path, "gcloud")
    assert command == shlex.split(shown)[1:]  # what is shown is what is done
    flags = {word.partition("=")[0] for word in command if word.startswith("--")}
    assert flags <= GCLOUD[" ".join(command[2:4])] | {"--zone", "--project"}


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["train", *TRAIN], TRAIN),
        (
            ["eval", "--out=o", "--workdir=it's", "--steps=1,2"],
            ["eval_fid.py", "--out=o", "--workdir=it's", "--steps=1,2"],
        ),
    ],
)
def test_a_pod_runs_our_command_on_every_host(tmp_path, words, command):
    """The remote command is really run by a shell, with the words that were given."""
    home = tmp_path / "home"
    (home / "flow" / "scripts").mkdir(parents=True)
    (home / "flow" / ".venv" / "bin").mkdir(parents=True)
    fake(home / "flow" / ".venv" / "bin", "python")
    shutil.copy(ROOT / "scripts/again.sh", home / "flow/scripts")
    remote = f'for word; do case $word in --command=*) cd "{home}"; sh -c "${{word#--command=}}";;'
    fake(tmp_path, "gcloud", f"{remote} esac; done")
    assert run("tpu_pod", *words, **POD, **on_path(tmp_path)).returncode == 0
    (call,) = calls(tmp_path, "gcloud")
    assert "--worker=all" in call
    place = home / "flow/.venv/bin"
    for _ in range(500):
        if calls(place, "python"):
            break
        time.sleep(0.02)
    assert calls(place, "python") == [command]
    assert int((home / "flow/flow.pid").read_text()) > 1
    parsed(command)


def test_a_pod_runs_one_command_at_a_time(tmp_path):
    home = tmp_path / "home"
    (home / "flow/scripts").mkdir(parents=True)
    (home / "flow/.venv/bin").mkdir(parents=True)
    python = fake(home / "flow/.venv/bin", "python", 'until [ -e "$0.stop" ]; do sleep 0.05; done')
    shutil.copy(ROOT / "scripts/again.sh", home / "flow/scripts")
    remote = f'--command=*) cd "{home}"; sh -c "${{word#--command=}}" || exit;;'
    fake(tmp_path, "gcloud", f"for word; do case $word in {remote} esac; done")
    words, surroundings = ["train", *TRAIN], POD | on_path(tmp_path)
    assert run("tpu_pod", *words, **surroundings).returncode == 0
    again = run("tpu_pod", *words, **surroundings)
    assert again.returncode == 2 and "a command runs" in again.stderr
    (python.parent / "python.stop").touch()
    place = pathlib.Path("/proc", (home / "flow/flow.pid").read_text().strip(), "cmdline")
    while place.exists() and place.read_text():
        time.sleep(0.05)
    assert run("tpu_pod", *words, **surroundings).returncode == 0  # it has ended


def test_a_pod_gets_what_git_has_and_its_packages(tmp_path):
    fake(tmp_path, "gcloud")
    fake(tmp_path, "git")
    assert run("tpu_pod", "install", **POD, **on_path(tmp_path)).returncode == 0
    copy, install = calls(tmp_path, "gcloud")
    assert copy[2:4] == ["tpu-vm", "scp"] and copy[5:] == [
        "pod:flow.tar.gz",
        "--worker=all",
        "--zone=here-1",
    ]
    assert calls(tmp_path, "git")[0][:2] == ["archive", "--format=tar.gz"]
    assert "make setup EXTRAS=tpu" in install[5] or "make setup EXTRAS=tpu" in install[6]
    makefile = (ROOT / "Makefile").read_text()
    assert "EXTRAS" in makefile and "\nsetup:" in makefile
