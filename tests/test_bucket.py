"""Runs that lie in a bucket: the real commands against a server that speaks as Google's does."""

import importlib.util
import io
import json
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from pipelines.flow import FlowPipeline
from pipelines.plan import Plan, checked
from pipelines.runs import run_names
from tests.bucket import Bucket
from tests.forked import Commands, Done
from utils import files
from utils.checkpoint import Checkpoints
from utils.cli import UserError
from utils.log import Logger

ROOT = pathlib.Path(__file__).parents[1]
RUN = "gs://bucket/some/run"
WORDS = [
    *("train_flow.py", "--config=configs/toy.py:two_moons", "--batch_size=16"),
    *("--model.hidden_size=8", "--optimizer.warmup_steps=0", "--save_interval=10"),
    *("--log_interval=5", "--sample.steps=(1,)", "--sample.num=4", "--keep_checkpoints=2"),
    "--optimizer.schedule=constant",
]
needs_gcsfs = pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed: pip install gcsfs"
)


class Remote(NamedTuple):
    """A bucket, commands that take it for Google's, and a folder of this machine."""

    bucket: Bucket
    commands: Commands
    folder: pathlib.Path

    def __call__(self, *words: str) -> Done:
        """Runs a command."""
        return self.commands(list(words), ROOT)

    def read(self, name: str) -> bytes:
        """What an object of the run holds."""
        return self.bucket.objects[f"some/run/{name}"][1]

    def saved(self) -> list[int]:
        """The steps whose checkpoints are finished."""
        names = [name.removeprefix("some/run/checkpoints/") for name in self.bucket.objects]
        return sorted(
            int(n.partition("/")[0]) for n in names if n.count("/") == 1 and "commit" in n
        )

    def logged(self) -> list[int]:
        """The steps of metrics.jsonl."""
        return [json.loads(line)["step"] for line in self.read("metrics.jsonl").splitlines()]


@pytest.fixture(scope="module")
def remote(tmp_path_factory) -> Iterator[Remote]:
    """A bucket that holds a run of 40 steps, whose second save was refused."""
    folder = tmp_path_factory.mktemp("here")
    with Bucket() as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment(folder).items():
            patch.setenv(name, value)
        with Commands() as commands:
            yield Remote(bucket, commands, folder)


@pytest.fixture(scope="module")
def trained(remote) -> tuple[Remote, Done]:
    """The bucket with a run, whose save 20 is refused and 30 asked to wait, and how it ended."""
    busy = iter([503] * 3)

    def fails(method: str, path: str) -> int:
        sent = "/upload/" in path and "media" in path
        if sent and "checkpoints%2F20" in path:
            return 403
        return next(busy, 0) if sent and "checkpoints%2F30" in path else 0

    remote.bucket.fails = fails
    done = remote(*WORDS, f"--workdir={RUN}", "--max_steps=40")
    remote.bucket.fails = lambda method, path: 0
    return remote, done


@needs_gcsfs
def test_a_save_that_is_refused_costs_that_checkpoint_alone(trained):
    remote, done = trained
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: checkpoint 20 could not be saved") == 1
    assert done.stderr.count("warning:") == 1 and "Traceback" not in done.stderr
    assert remote.saved() == [30, 40]
    refused = {path for _, path, status in remote.bucket.asked if status == 403}
    assert refused and all("checkpoints%2F20" in path for path in refused)
    assert [status for *_, status in remote.bucket.asked].count(503) == 3
    assert not [name for name in remote.bucket.objects if "checkpoints/20" in name]


@needs_gcsfs
def test_logs_and_pictures_lie_there(trained):
    remote, _ = trained
    assert remote.logged()[:8] == [5, 10, 15, 20, 25, 30, 35, 40]
    picture = Image.open(io.BytesIO(remote.read("samples/steps_1_0000040.png")))
    assert picture.format == "PNG" and min(picture.size) > 16
    assert json.loads(remote.read("config.json"))["objective"] == "flow_matching"
    assert not os.path.exists("gs:")


@needs_gcsfs
def test_what_is_read_there_is_what_was_copied(trained, tmp_path):
    """The run's objects, copied one by one, are a run of this machine; both draw the same."""
    remote, _ = trained
    for name, (_, content) in list(remote.bucket.objects.items()):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    out = tmp_path / "exported"
    done = remote("scripts/export.py", f"--workdir={RUN}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    here, there = (
        FlowPipeline.from_pretrained(tmp_path / "some/run"),
        FlowPipeline.from_pretrained(out),
    )
    assert here.card == there.card and here.card["train_steps"] == 40
    jax.tree.map(np.testing.assert_array_equal, here.params, there.params)


@needs_gcsfs
def test_evaluation_reads_its_checkpoints(trained):
    remote, _ = trained
    out = remote.folder / "eval"
    words = ["eval_fid.py", f"--workdir={RUN}", f"--out={out}", f"--cache_dir={remote.folder}/c"]
    done = remote(*words, "--steps=1", "--num_samples=100", "--checkpoint=all")
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {("run", 30), ("run", 40)} < {(row["run"], row["train_steps"]) for row in rows}


@needs_gcsfs
def test_the_same_command_goes_on_there(trained):
    """A damaged newest checkpoint is moved aside; its steps are made anew."""
    remote, _ = trained
    name = next(n for n in sorted(remote.bucket.objects) if "checkpoints/40/ema/d/" in n)
    remote.bucket.put(name, remote.bucket.objects[name][1][:-1] + b"?")
    done = remote(*WORDS, f"--workdir={RUN}", "--max_steps=50")
    assert done.returncode == 0, done.stderr
    assert "checkpoint 40 is damaged: moved to gs://bucket/some/run/damaged/40" in done.stderr
    assert "going on from checkpoint 30" in done.stderr
    assert remote.saved() == [40, 50]
    assert any("some/run/damaged/40/" in name for name in remote.bucket.objects)
    assert remote.logged() == list(range(5, 51, 5))


@needs_gcsfs
@pytest.mark.parametrize(
    "word, status, told",
    [
        ("--workdir=gs://nobodys/run", 0, "there is none of that name"),
        ("--workdir=gs://bucket/refused", 403, "Forbidden"),
        ("--data_dir=gs://bucket/data", 0, "name a folder of this machine"),
        ("--workdir=gs:/bucket/run", 0, "gs://BUCKET/FOLDER"),
        ("--workdir=http://bucket/run", 0, "gs://BUCKET/FOLDER"),
    ],
)
def test_a_bucket_that_is_not_to_be_had_is_told_before_training(remote, word, status, told):
    remote.bucket.fails = lambda method, path: status if "refused" in path else 0
    done = remote(*WORDS, "--max_steps=10", word)
    remote.bucket.fails = lambda method, path: 0
    assert done.returncode == 2 and told in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


# Without a bucket


def test_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", f"{tmp_path}/me")
    assert str(files.place("~/run")) == f"{tmp_path}/me/run"
    assert str(files.place("run/../b")) == f"{tmp_path}/b"
    assert not files.in_bucket(files.place("a"))
    for wrong in ("gs:/bucket/run", "gs://", "gs:///run", "http://host/run"):
        with pytest.raises(UserError, match="gs://BUCKET/FOLDER"):
            files.place(wrong)


def test_what_must_lie_here_says_so():
    for name in ("out", "cache_dir", "data_dir", "autoencoder", "reference"):
        with pytest.raises(UserError, match=f"--{name}=gs://b/f: name a folder of this machine"):
            checked(Plan(workdir=("gs://b/run",), **{name: "gs://b/f"}))


def test_without_a_client_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for use in (files.place, Checkpoints, FlowPipeline.from_pretrained):
        with pytest.raises(UserError, match="pip install gcsfs"):
            use("gs://bucket/run")


@needs_gcsfs
def test_runs_in_buckets_have_names_as_others_do(tmp_path):
    place = str(files.place("gs://bucket/a/run"))
    assert place == "gs://bucket/a/run"
    here = tmp_path / "here"
    here.mkdir()
    found = run_names([place, "gs://bucket/b/run", str(here), place])
    assert {name: str(path) for name, path in found.items()} == {
        "a_run": place,
        "b_run": "gs://bucket/b/run",
        "here": str(here),
    }


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "folder" / "file"
    files.write(path, "first")
    with pytest.raises(ZeroDivisionError):
        files.write(path, lambda file: file.write(b"second" * (1 // 0)))
    assert path.read_text() == "first" and files.names(files.place(path.parent)) == ["file"]
    assert files.names(files.place(tmp_path / "none")) == []


def test_lines_are_kept_while_a_bucket_fails(tmp_path, monkeypatch, capsys):
    """What cannot be appended to is written whole: a write that fails loses no line."""
    config = ConfigDict({"wandb": {"mode": "disabled"}, "tensorboard": False})
    written, failing = [], iter([False, True, True, False])

    def write(path, content):
        if next(failing):
            raise OSError("no answer")
        written.append(content)

    with Logger(tmp_path, config) as logger:
        monkeypatch.setattr(files, "in_bucket", lambda path: True)
        monkeypatch.setattr(files, "write", write)
        for step in range(1, 5):
            logger.scalars(step, {"loss": 1.0})
    assert [json.loads(line)["step"] for line in written[-1].splitlines()] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("logs are being lost") == 1
