"""Claims: of all who want a job exactly one gets it, and what the dead held is taken over.

Holders are real processes that get real signals.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from utils import claims
from utils.claims import Claims

ROOT = pathlib.Path(__file__).parents[1]
SHORT = {"expires": 2.0, "beat": 0.2}  # seconds

HOLDER = """
import sys
from utils.claims import Claims
with Claims(sys.argv[1], **{options}).take("job") as claim:
    print("taken" if claim else "refused", flush=True)
    for line in sys.stdin:
        print(claim.held(), flush=True)
"""
# Works through all names; a folder that is there already shows a second holder.
WORKER = """
import os, pathlib, sys, time
from utils.claims import Claims
folder, names = pathlib.Path(sys.argv[1]), sys.argv[2].split()
claims = Claims(folder / "claims")
print("ready", flush=True)
sys.stdin.readline()
for name in names:
    with claims.take(name) as claim:
        if claim and not (folder / name).exists():
            os.mkdir(folder / "busy" / name)
            time.sleep(0.002)
            assert claim.held()
            os.rmdir(folder / "busy" / name)
            (folder / name).touch()
            print(name, flush=True)
"""


def start(script: str, *arguments: object) -> subprocess.Popen:
    """A process that runs `script`, and hears and speaks line by line."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen) -> str:
    """The next line of a process's output."""
    return process.stdout.readline().strip()


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the claim on 'job'; it is killed at the end."""
    started = []

    def begin(**options: float) -> subprocess.Popen:
        process = start(HOLDER.format(options=options), tmp_path)
        started.append(process)
        assert said(process) == "taken"
        return process

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def files(folder: pathlib.Path) -> list[str]:
    """What lies in a folder."""
    return sorted(os.listdir(folder))


def leave_dead(folder: pathlib.Path, name: str, generation: int = 0, **changed: object) -> None:
    """Leaves the claim of a process of this machine whose number another process now has."""
    owner = claims._this_process()
    content = owner._asdict() | {"started": owner.started - 100} | changed
    (folder / f"{name}.claim.{generation}").write_text(json.dumps(content))


def test_a_claim_keeps_others_away_and_ends_with_its_context(tmp_path):
    jobs, others = Claims(tmp_path), Claims(tmp_path)
    with jobs.take("job") as claim, others.take("job") as second:
        assert claim.held() and second is None
        assert others.holder("job") == f"{claims.socket.gethostname()}:{os.getpid()}"
        with others.take("job.claim") as like, others.take("jo") as shorter:
            assert like.held() and shorter.held()  # names that only begin alike are other jobs
        assert claim.held()
    assert not claim.held() and jobs.holder("job") == "" and files(tmp_path) == []
    with pytest.raises(KeyError), jobs.take("job"):
        raise KeyError
    assert files(tmp_path) == []
    with jobs.take("job") as again:
        assert again.held()


@pytest.mark.parametrize("generations", [0, 3])
def test_eight_processes_take_each_job_once(tmp_path, generations):
    """With three generations, every job has the claims of three dead holders."""
    names = [f"cell-{k}" for k in range(50)]
    (tmp_path / "busy").mkdir()
    (tmp_path / "claims").mkdir()
    for name in names:
        for generation in range(generations):
            leave_dead(tmp_path / "claims", name, generation)
    workers = [start(WORKER, tmp_path, " ".join(names)) for _ in range(8)]
    assert [said(worker) for worker in workers] == ["ready"] * 8
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    done = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 8
    assert sorted(name for own in done for name in own) == sorted(names)
    assert files(tmp_path / "claims") == []


@pytest.mark.parametrize("dead", [True, False])
def test_of_rivals_for_one_job_one_wins(tmp_path, dead):
    """All begin at the same time, and the winner holds the claim until all have tried."""
    rounds, rivals = 100, 8
    begin, end, won = threading.Barrier(rivals), threading.Barrier(rivals), [0] * rounds

    def compete() -> None:
        jobs = Claims(tmp_path)
        for k in range(rounds):
            begin.wait(20)
            with jobs.take(f"job{k}") as claim:
                won[k] += claim is not None and claim.held()
                end.wait(20)

    for k in range(rounds if dead else 0):
        leave_dead(tmp_path, f"job{k}", generation=k % 3)
    threads = [threading.Thread(target=compete, daemon=True) for _ in range(rivals)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert won == [1] * rounds
    assert files(tmp_path) == []


@pytest.mark.parametrize("reaped", [True, False])
def test_the_claim_of_a_killed_process_is_taken_over_at_once(tmp_path, holder, reaped):
    process, jobs = holder(), Claims(tmp_path)
    assert jobs.holder("job").endswith(f":{process.pid}")
    with jobs.take("job") as claim:
        assert claim is None
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if reaped:
        process.wait()
    assert jobs.holder("job") == ""
    with jobs.take("job") as claim:
        assert claim.held() and files(tmp_path) == ["job.claim.1"]
    assert files(tmp_path) == []


def test_a_stopped_process_loses_its_claim_and_knows(tmp_path, holder):
    process, jobs = holder(**SHORT), Claims(tmp_path, **SHORT)
    time.sleep(1.5 * jobs.expires)
    with jobs.take("job") as claim:
        assert claim is None  # it was renewed
    process.send_signal(signal.SIGSTOP)
    deadline, claim = time.monotonic() + 10, None
    while claim is None and time.monotonic() < deadline:
        with jobs.take("job") as claim:
            if claim:
                process.send_signal(signal.SIGCONT)
                print("", file=process.stdin, flush=True)
                assert said(process) == "False"
                process.communicate()  # it ends, and leaves alone what is no longer its own
                assert claim.held() and files(tmp_path) == ["job.claim.1"]
        time.sleep(0.05)
    assert claim is not None


def test_a_process_that_was_stopped_for_long_and_robbed_by_nobody_still_holds(tmp_path, holder):
    process = holder(**SHORT)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.2 * SHORT["expires"])
    process.send_signal(signal.SIGCONT)
    print("", file=process.stdin, flush=True)
    assert said(process) == "True"


@pytest.mark.parametrize(
    ("changed", "age", "alive"),
    [
        ({"started": None}, 0, True),  # this very process
        ({}, 0, False),  # its number, of an earlier process
        ({"machine": "of others"}, 0, True),  # of whose processes nothing is known
        ({"machine": "of others"}, 250, True),
        ({"machine": "of others"}, 350, False),
        ({"started": None}, 350, False),  # alive and not renewing, as when stopped
    ],
)
def test_who_is_dead(tmp_path, changed, age, alive):
    if "started" in changed:
        changed = {"started": claims._this_process().started}
    leave_dead(tmp_path, "job", **changed)
    path = tmp_path / "job.claim.0"
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    jobs = Claims(tmp_path, expires=300)
    assert bool(jobs.holder("job")) == alive
    with jobs.take("job") as claim:
        assert (claim is None) == alive


@pytest.mark.parametrize("content", [b"", b'{"ho', b"[]", b"3", b'{"token": "t"}'])
def test_a_claim_without_its_content_lives_until_it_expires(tmp_path, content):
    """Its maker may be about to write it, or was killed before it could."""
    path, jobs = tmp_path / "job.claim.0", Claims(tmp_path)
    path.write_bytes(content)
    with jobs.take("job") as claim:
        assert claim is None and jobs.holder("job") == "unknown"
    os.utime(path, (0, 0))
    with jobs.take("job") as claim:
        assert claim.held() and files(tmp_path) == ["job.claim.1"]


class Slow(Claims):
    """Does something else between finding a claim dead and taking it over."""

    def _is_dead(self, seen: claims._Seen) -> bool:
        dead, meanwhile = super()._is_dead(seen), self.__dict__.pop("meanwhile", None)
        if meanwhile:
            meanwhile()
        return dead


def test_an_old_view_takes_nothing_from_a_living_holder(tmp_path):
    """The dead claim was taken over and released, and a third holds the job, under its number."""
    slow, fast = Slow(tmp_path), Claims(tmp_path)
    with contextlib.ExitStack() as stack:
        third = []

        def meanwhile() -> None:
            with fast.take("job") as claim:
                assert claim.held() and files(tmp_path) == ["job.claim.1"]
            third.append(stack.enter_context(fast.take("job")))
            assert files(tmp_path) == ["job.claim.0"]

        leave_dead(tmp_path, "job")
        slow.meanwhile = meanwhile
        with slow.take("job") as claim:
            assert claim is None and third[0].held()
    assert files(tmp_path) == []


def test_a_loser_never_makes_the_winners_claim_anew(tmp_path):
    """The winner has come and gone: the loser begins anew, with a claim of its own."""
    slow, fast = Slow(tmp_path), Claims(tmp_path)

    def meanwhile() -> None:
        with fast.take("job") as claim:
            assert claim.held()

    leave_dead(tmp_path, "job")
    slow.meanwhile = meanwhile
    with slow.take("job") as claim:
        assert claim.held() and files(tmp_path) == ["job.claim.0"]


def test_a_first_claim_yields_to_a_later_generation(tmp_path, monkeypatch):
    """The folder looked empty, and since then a dead holder's claim was taken over."""
    listed = claims._generations
    views = [[]]  # the first look is an old one
    monkeypatch.setattr(claims, "_generations", lambda *a: views.pop() if views else listed(*a))
    leave_dead(tmp_path, "job", generation=1, started=claims._this_process().started)
    with Claims(tmp_path).take("job") as claim:
        assert claim is None
    assert files(tmp_path) == ["job.claim.1"]


def test_a_lost_claim_is_neither_renewed_nor_removed(tmp_path):
    """Even where the new holder's claim has the same name."""
    path = tmp_path / "job.claim.0"
    with Claims(tmp_path, expires=1, beat=0.05).take("job") as claim:
        path.unlink()
        leave_dead(tmp_path, "job")
        os.utime(path, (0, 0))
        time.sleep(0.2)
        assert not claim.held() and path.stat().st_mtime == 0
    assert files(tmp_path) == ["job.claim.0"]


def test_a_claim_is_lost_as_soon_as_a_later_one_is_there(tmp_path):
    with Claims(tmp_path).take("job") as claim:
        leave_dead(tmp_path, "job", generation=1)
        assert not claim.held()
    assert files(tmp_path) == ["job.claim.1"]


def test_a_folder_that_is_gone_holds_nothing(tmp_path):
    folder = tmp_path / "folder"
    with Claims(folder).take("job") as claim:
        (folder / "job.claim.0").unlink()
        folder.rmdir()
        assert not claim.held()


@pytest.mark.parametrize("name", ["", ".job", "a/b"])
def test_names_that_are_no_file_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="file name"), Claims(tmp_path).take(name):
        pass


def test_a_beat_that_one_delay_would_make_too_late_is_refused(tmp_path):
    with pytest.raises(ValueError, match="half"):
        Claims(tmp_path, expires=10, beat=5)
