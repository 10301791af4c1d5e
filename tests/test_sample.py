"""sample.py: what is asked for is drawn, files say how, animations end where they should."""

import dataclasses
import functools
import math
import os
import pathlib
import pty
import shlex
import signal
import subprocess
import sys
import tempfile
import termios
import types
import typing

import jax
import numpy as np
import pytest
from PIL import Image

from configs import digits, toy
from pipelines import sampling, sampling_files, sampling_video, sampling_watch
from pipelines.flow import FlowPipeline
from pipelines.sampling import Job, Sampling
from tests.forked import ROOT
from utils import cli, figures, terminal
from utils.cli import UserError

PRETRAINED = str(ROOT / "pretrained" / "digits_mean_flow")
_KEPT = tempfile.TemporaryDirectory()  # for as long as the tests run
MEAN_FLOW, FLOW = (f"{_KEPT.name}/{objective}" for objective in ("mean_flow", "flow_matching"))


@pytest.fixture(scope="module", autouse=True)
def models() -> None:
    """Exported digits of a network that compiles fast, with no weight left at zero."""
    for folder in (MEAN_FLOW, FLOW):
        config = digits.get_config()
        config.objective = pathlib.Path(folder).name
        config.model.update({"depth": 1, "hidden_size": 32, "num_heads": 2, "unroll": 1})
        card = {"shape": [8, 8, 1], "num_classes": 10, "flops_per_step": 1, "train_steps": 1000}
        built = FlowPipeline.build(config, card)
        leaves, tree = jax.tree.flatten(jax.eval_shape(built.network.init, jax.random.key(0)))
        rng = np.random.default_rng(1)
        drawn = [np.float32(0.2 * rng.standard_normal(leaf.shape)) for leaf in leaves]
        built.with_params(jax.tree.unflatten(tree, drawn)).save_pretrained(folder)


@functools.cache
def loaded(workdir: str) -> Job:
    """A job whose pipeline the tests share, so that a program is compiled once."""
    return sampling.prepare(Sampling(workdir))


def job(out: pathlib.Path | str = "", workdir: str = MEAN_FLOW, **options) -> Job:
    """What sample.py prepares for these options."""
    prepared = sampling.prepare(Sampling(workdir, out=str(out), **options))
    return prepared._replace(pipeline=loaded(workdir).pipeline)


def pictures(asked: Job) -> np.ndarray:
    """The pictures of a job with one step count, as integers that can be subtracted."""
    (drawn,) = sampling.draw_all(asked)
    return drawn.samples.astype(int)


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether pictures are the same but for the rounding of a last bit."""
    return a.shape == b.shape and np.abs(a - b).max() <= 1


# What is drawn.


def test_a_picture_depends_on_its_seed_index_and_label_alone():
    many = job(labels=("7", "-1"), num=8, seed=5)
    whole = pictures(many)
    assert alike(whole, pictures(job(labels=("7", "-1"), num=8, seed=5, batch_size=7)))
    assert alike(whole[:8], pictures(job(labels=("7", "-1"), num=4, seed=5)))
    label = str(many.labels[13])
    one = job(labels=(label,), num=1, seed=5, first=13)
    assert alike(whole[13:14], pictures(one))
    assert set(many.labels[::2]) == {7}
    assert len(set(many.labels[1::2])) > 2
    assert not alike(whole, pictures(job(labels=("7", "-1"), num=8, seed=6)))


def test_batches_are_full_and_give_what_was_asked():
    """The last batch is filled up, so that none compiles anew; no sample of it comes back."""
    asked = job()
    sizes = []

    def draw(labels, **options):
        sizes.append(len(labels))
        return FlowPipeline.draw(loaded(MEAN_FLOW).pipeline, labels, **options)

    spied = asked._replace(pipeline=types.SimpleNamespace(draw=draw))
    labels, indices = np.arange(10, dtype=np.int32), np.arange(20, 30, dtype=np.int32)
    noise = asked.pipeline.noise(0, indices)
    for options in ({}, {"noise": noise}, {"keep": True, "steps": 2}):
        parts = list(sampling.batches(spied, labels, indices, 8, **options))
        whole = np.concatenate([samples for samples, _ in parts], axis=int("keep" in options))
        own = asked.pipeline(labels, indices=indices, **options).astype(int)
        assert alike(whole.astype(int), own)
        assert [len(calls) for _, calls in parts] == [8, 2]
    assert sizes == [8] * 6


def test_step_counts_stand_side_by_side_from_the_same_noise(tmp_path):
    asked = job(tmp_path, labels=("3", "8"), num=2, steps=(1, 4), seed=2)
    one, four = list(sampling.draw_all(asked))
    assert list(one.calls) == [1] * 4
    assert list(four.calls) == [4] * 4
    own = asked.pipeline(np.array([3, 8, 3, 8]), steps=4, seed=2).astype(int)
    assert alike(four.samples.astype(int), own)
    sheet = sampling_files.sheet(asked, [one, four])
    expected = [picture for pair in zip(one.samples, four.samples, strict=True) for picture in pair]
    words = [word for word in "3838" for _ in range(2)]
    heads = ["1 step", "4 steps"]
    np.testing.assert_array_equal(sheet, figures.labelled(np.stack(expected), words, 2, heads))


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"sampler": "heun", "steps": (4,)}, 8),
        ({"guidance": 2.0, "guidance_interval": "0.4:1", "steps": (4,)}, 4 + 3),
        ({"grid": ("1", "0.6", "0")}, 2),
    ],
)
def test_network_calls_are_counted(options, calls):
    (drawn,) = sampling.draw_all(job(workdir=FLOW, num=8, **options))
    assert set(drawn.calls) == {calls}
    assert f"{calls} network calls each" in sampling.told(drawn, 64)


def test_dopri5_tells_how_many_steps_it_chose(tmp_path):
    asked = job(tmp_path, FLOW, num=8, sampler="dopri5", tolerance=1e-3)
    (drawn,) = sampling.draw_all(asked)
    assert drawn.calls.min() > 6
    drawn = drawn._replace(calls=drawn.calls + 6 * (np.arange(8) % 2))
    low = int(drawn.calls.min())
    assert f"dopri5: {low} to {low + 6}, {low + 3}.0 on average, network calls each" in (
        sampling.told(drawn, 64)
    )
    facts = sampling_files.about(asked, [drawn], 3)
    assert facts["network_calls"] == str(drawn.calls[3])
    assert facts["steps"] == "adaptive"
    assert "--tolerance=0.001" in facts["command"]


# What is written.


def parsed(command: str) -> Sampling:
    """The options of a command line, as the script reads them."""
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "sample.py")
    given = dict(word.removeprefix("--").split("=", 1) for word in words)
    lists = [name for name, value in Sampling()._asdict().items() if isinstance(value, tuple)]
    kinds = typing.get_type_hints(Sampling)
    return Sampling(
        **{
            name: cli._value(name, value.split(","), kinds[name])
            if name in lists
            else type(getattr(Sampling(), name))(value)
            for name, value in given.items()
        }
    )


def test_files_say_how_they_were_made_and_the_command_makes_them_again(tmp_path):
    options = {"labels": ("-1", "none"), "num": 4, "seed": 4, "steps": (2,), "guidance": 1.5}
    asked = job(tmp_path / "first", **options)
    told = sampling_files.write(asked, list(sampling.draw_all(asked)))
    place = f"{tmp_path}/first/random+no_class_steps2_guidance1.5_seed4"
    assert told == [f"{place}.png: the grid", f"{place}: 8 single pictures"]
    files = sorted(pathlib.Path(place).iterdir())
    facts = figures.read_text(files[2])
    assert facts["index"] == "2"
    assert facts["label"] == facts["class"] == str(asked.labels[2])
    assert (facts["steps"], facts["network_calls"], facts["seed"]) == ("2", "4", "4")
    assert figures.read_text(files[1])["class"] == "no class"
    for file in [*files[1:3], pathlib.Path(f"{place}.png")]:
        again = parsed(figures.read_text(file)["command"])._replace(out=str(tmp_path / "again"))
        other = job(**again._asdict())
        sampling_files.write(other, list(sampling.draw_all(other)))
        (found,) = (tmp_path / "again").rglob(file.name)
        a, b = (np.asarray(Image.open(path)).astype(int) for path in (file, found))
        assert alike(a, b)


def test_the_command_as_a_user_runs_it(tmp_path):
    """The network that comes with the code, in a folder of one's own."""
    words = [f"--workdir={PRETRAINED}", "--labels=7", "--num=8", "--batch_size=4"]
    command = [sys.executable, str(ROOT / "sample.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "1 step: 1 network call each (NFE); 4 in " in done.stdout
    assert "a second" in done.stdout
    (grid,) = tmp_path.glob("runs/samples/pretrained_digits_mean_flow/*.png")
    assert f"{grid.relative_to(tmp_path)}: the grid" in done.stdout
    files = sorted(grid.with_suffix("").iterdir())
    assert [file.name for file in files] == [f"0000{i}_7.png" for i in range(8)]
    pipeline = FlowPipeline.from_pretrained(PRETRAINED)
    own = pipeline(np.full(8, 7), seed=0)[..., 0].astype(int)
    drawn = np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)
    assert alike(drawn, own)


def test_other_settings_have_other_names(tmp_path):
    settings: list[dict] = [{}, {"seed": 1}, {"steps": (2,)}, {"steps": (1, 2)}, {"labels": ("3",)}]
    settings += [{"labels": ("3", "4")}, {"guidance": 2.0}, {"grid": ("1", "0.5", "0")}]
    settings += [{"guidance": 2.0, "guidance_interval": "0:0.5"}, {"sampler": "euler"}]
    settings += [{"sampler": "dopri5"}, {"sampler": "dopri5", "tolerance": 0.1}, {"first": 7}]
    settings += [{"grid": ("cosine",), "steps": (2,)}, {"grid": ("1", "0.50000001", "0")}]
    settings += [{"labels": tuple("1234")}, {"labels": tuple("5678")}, {"labels": ("3", "-1")}]
    settings += [{"labels": ("-1",)}, {"num": 8}, {"labels": ("3",), "num": 8}]
    settings += [{"autoencoder": "a"}, {"autoencoder": "b"}, {"guidance": 2.0000002}]
    films = [{"video": "interpolation"}, {"video": "interpolation", "video_seconds": 2.0}]
    grids = [
        ("1", *(f"{0.9 - i / 100:g}" for i in range(80)), end, "0") for end in ("0.04", "0.03")
    ]
    settings += films + [{"grid": times} for times in grids]
    prepared = [job(tmp_path, **options) for options in settings]
    names = ("a/b", "a b", "A", "a", *"ghijkl")
    labelled = job(tmp_path, labels=("0",))
    prepared += [labelled._replace(names=names, words=(label,)) for label in range(4)]
    stems = [sampling_files.stem(each) for each in prepared]
    kinds = [each.options.video for each in prepared]  # which a film's name tells too
    assert len(set(zip(map(str.casefold, stems), kinds, strict=True))) == len(stems)
    assert max(map(len, stems)) < 160
    assert stems[0] == "steps1_seed0"


def test_what_a_model_says_is_told_in_a_line():
    asked = job()
    hostile = asked._replace(options=asked.options._replace(workdir="a\x1b[2J\nb"), seed=5)
    assert sampling.described(hostile).startswith("a?[2J b: mean_flow after 1,000 steps")


def test_names_come_from_the_card():
    """Any bytes can stand in a folder's name; a name is shown in one line."""
    own = loaded(MEAN_FLOW).pipeline
    names = [f"class {i}" for i in range(9)] + ["a/b\udcff\x1b[1m\n c"]
    named = dataclasses.replace(own, card=own.card | {"class_names": names})
    assert sampling.class_names(named)[9] == "a/b??[1m c"
    fewer = dataclasses.replace(own, card=own.card | {"class_names": names[1:]})
    with pytest.raises(UserError, match="are not 10 names: mend it"):
        sampling.class_names(fewer)
    for none in ({}, {"class_names": []}):
        unnamed = dataclasses.replace(own, card=own.card | none)
        assert sampling.class_names(unnamed) == tuple("0123456789")
    thousand = {"num_classes": 1000, "dataset": "imagenet256 0123456789ab"}
    assert sampling.class_names(dataclasses.replace(own, card=own.card | thousand))[207] == (
        "golden retriever"
    )


# Points.


@functools.cache
def points_folder(root: pathlib.Path) -> str:
    """An exported network on the plane, as it is before training."""
    config = toy.get_config("two_moons")
    config.objective = "flow_matching"
    config.model.update({"depth": 1, "hidden_size": 16})
    card = {"shape": [2], "num_classes": 0, "flops_per_step": 1, "train_steps": 5}
    card["dataset"] = "two_moons 0"
    built = FlowPipeline.build(config, card)
    built.with_params(built.network.init(jax.random.key(0))).save_pretrained(root / "toy")
    return str(root / "toy")


def test_points_are_one_figure(tmp_path):
    asked = sampling.prepare(
        Sampling(points_folder(tmp_path), num=800, steps=(1, 3), out=str(tmp_path))
    )
    told = sampling_files.write(asked, list(sampling.draw_all(asked)))
    (path,) = tmp_path.glob("*.png")
    assert told == [f"{path}: 800 points"]
    assert figures.read_text(path)["steps"] == "1,3"
    dark = np.asarray(Image.open(path).convert("L")) < 200
    assert dark.mean() > 0.01
    film = sampling_video.denoising(asked._replace(steps=(3,)))
    frames = list(film.frames)
    assert len(frames) == film.length == 4
    assert not np.array_equal(frames[0], frames[-1])
    with pytest.raises(UserError, match="for pictures: give --video=denoising"):
        sampling.prepare(Sampling(points_folder(tmp_path), video="interpolation"))
    with pytest.raises(UserError, match="--labels=3: this model knows no classes"):
        sampling.prepare(Sampling(points_folder(tmp_path), labels=("3",)))


# Animations.


def frames_of(path: pathlib.Path) -> tuple[list[np.ndarray], list[int]]:
    """The frames of an animation, and how many milliseconds each stands."""
    with Image.open(path) as moving:
        assert moving.info["loop"] == 0
        frames, durations = [], []
        for number in range(moving.n_frames):
            moving.seek(number)
            moving.load()
            frames.append(np.asarray(moving.convert("L")))
            durations.append(moving.info["duration"])
    return frames, durations


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_denoising_ends_in_the_pictures(tmp_path, kind):
    options = {"labels": ("7", "2"), "num": 3, "steps": (6,), "seed": 1}
    asked = job(tmp_path, FLOW, video="denoising", video_format=kind, **options)
    path, count = sampling_video.write(asked)
    frames, durations = frames_of(path)
    assert count == len(frames) == 7
    assert math.isclose(sum(durations), 4000, abs_tol=70)
    assert durations[-1] > 1000 > durations[0]
    samples = pictures(job(tmp_path, FLOW, **options)).astype(np.uint8)
    last = figures.labelled(samples, list("727272"), 2, ["t = 0.00", ""])[..., 0]
    assert np.abs(frames[-1].astype(int) - last).max() <= 2
    noise = asked.pipeline.noise(1, np.arange(6))
    first = figures.labelled(
        np.clip(127.5 * noise + 128, 0, 255).astype(np.uint8), list("727272"), 2, ["t = 1.00", ""]
    )
    assert np.abs(frames[0].astype(int) - first[..., 0]).max() <= 2


def test_a_video_decodes_the_times_that_it_shows_alone(monkeypatch):
    """Of 40 steps 8 frames, whose pictures are those that the whole way, decoded, has there."""
    asked = job(workdir=FLOW, num=5, steps=(40,), video="denoising", batch_size=2)
    asked = asked._replace(options=asked.options._replace(video_seconds=0.55))
    whole = asked.pipeline(asked.labels, indices=asked.indices, steps=40, keep=True)
    decoded, drawn, decode = [], [], sampling_video._decode
    monkeypatch.setattr(sampling_video, "_decode", lambda c, x: decoded.append(x) or decode(c, x))
    monkeypatch.setattr(sampling_video, "_frame", lambda job, x, *_: drawn.append(x) or x)
    film = sampling_video.denoising(asked)
    assert not decoded
    assert len(list(film.frames)) == film.length == 8
    assert [len(x) for x in decoded] == [2] * 3 * 8
    shown = np.linspace(0, 40, 8).round().astype(int)
    assert alike(np.stack(drawn).astype(int), whole[shown].astype(int))


@pytest.mark.parametrize(
    ("options", "size", "told"),
    [
        ({"num": 8}, 8 * 64, "smaller --num, or fewer --labels or --steps"),
        ({"num": 8, "steps": (1, 2)}, 2 * 8 * 64, "fewer --labels or --steps"),
        # The whole way of a batch, and the five frames of all.
        (
            {"num": 6, "steps": (4,), "video": "denoising", "batch_size": 4},
            4 * 64 * (5 * 4 + 5 * 6),
            "smaller --num, --steps or --batch_size",
        ),
        (
            {"num": 2, "labels": ("3", "4"), "video": "interpolation", "video_seconds": 0.2},
            4 * 2 * 64 * (1 + 4),
            "fewer --labels, or a smaller --num or --video_seconds",
        ),
    ],
)
def test_what_memory_cannot_hold_is_told_before_it_is_drawn(
    tmp_path, monkeypatch, options, size, told
):
    asked = job(tmp_path, **options)
    draw = sampling_video.write if asked.options.video else lambda job: list(sampling.draw_all(job))
    monkeypatch.setattr(sampling, "MOST_BYTES", size)
    draw(asked)
    monkeypatch.setattr(sampling, "MOST_BYTES", size - 1)
    monkeypatch.setattr(sampling, "fetch", None)
    with pytest.raises(UserError, match=f"the samples would take .* GiB of memory.*{told}"):
        draw(asked)


def test_an_interpolation_passes_through_its_noises_and_closes(tmp_path):
    asked = job(
        tmp_path, labels=("3", "8"), num=2, video="interpolation", video_seconds=1.0, batch_size=8
    )
    path, count = sampling_video.write(asked)
    frames, durations = frames_of(path)
    assert (count, sum(durations), len(frames)) == (20, 1000, 20)
    stills = pictures(job(labels=("3", "8"), num=2)).astype(np.uint8)
    for frame, own in ((0, stills[:2]), (10, stills[2:])):
        expected = figures.labelled(own, ["3", "8"])[..., 0]
        assert np.abs(frames[frame].astype(int) - expected).max() <= 2
    steps = [np.abs(a.astype(int) - b).mean() for a, b in zip(frames, [*frames[1:], frames[0]])]  # noqa: B905
    assert max(steps) < 4 * np.mean(steps)  # no jump, at the end of the loop neither


def test_between_two_noises_lies_noise():
    """On the arc the length of the two is kept; on the chord it would shrink by √2."""
    a, b = np.random.default_rng(0).standard_normal((2, 1, 3, 64, 64)).astype(np.float32)
    way = sampling_video.loop(np.stack([a, b]), 8)
    lengths = np.sqrt((way**2).mean(axis=(2, 3, 4))) if way.ndim == 5 else way.std(axis=(2, 3))
    np.testing.assert_allclose(lengths, 1, atol=0.03)
    np.testing.assert_allclose(way[[0, 4]], np.stack([a, b]), atol=1e-6)
    same = sampling_video.loop(np.stack([a, a]), 4)
    np.testing.assert_allclose(same, np.stack([a] * 4), atol=1e-6)


FFMPEG = """#!/bin/sh
echo "$@" > "$0.arguments"
for last; do :; done
cat > "$last"
[ ! -e "$0.broken" ] || { echo "no encoder" >&2; exit 1; }
"""


def test_mp4_goes_through_ffmpeg(tmp_path, monkeypatch):
    """A stand-in, which writes down what it is given."""
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(FFMPEG)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    options = {"labels": ("7", "2"), "num": 2, "steps": (6,), "video_format": "mp4"}
    asked = job(tmp_path / "out", FLOW, video="denoising", **options)
    path, count = sampling_video.write(asked)
    film = sampling_video.denoising(asked)
    frames = [np.ascontiguousarray(frame) for frame in film.frames]
    rest = round(film.hold * film.fps)
    assert (count, rest) == (7, 2)
    assert path.read_bytes() == b"".join(f.tobytes() for f in [*frames, *[frames[-1]] * rest])
    height, width, _ = frames[0].shape
    assert f"-pix_fmt gray -s {width}x{height} -r {film.fps:g}" in (
        program.with_name("ffmpeg.arguments").read_text()
    )
    program.with_name("ffmpeg.broken").touch()
    path.unlink()
    with pytest.raises(UserError, match=r"ffmpeg failed \(no encoder\): take webp or gif"):
        sampling_video.write(asked)
    assert list((tmp_path / "out").iterdir()) == []


# Again at each key.


class Run:
    """A run in training: it has one more checkpoint each time it is asked."""

    def __init__(self, path, pipeline):
        self.path, self.pipeline, self.steps = path, pipeline, 100

    def checkpoints(self, asked):
        self.steps += 100
        return (self.steps,)

    def load(self, step, ema):
        return self.pipeline


def test_each_key_does_its_own(tmp_path):
    told: list[str] = []
    with (tmp_path / "keys").open("w+") as stream:
        stream.write("\nr\n2\n+\n-\ns\nx\nq\n\n")
        stream.seek(0)
        sampling_watch.watch(job(tmp_path / "out", num=4), stream, told.append)
    shown = [line.partition(", network")[0] for line in told if "watch.png" in line]
    place = f"{tmp_path / 'out' / 'watch.png'}: "
    assert shown == [
        f"{place}seed {seed}, steps {steps}"
        for seed, steps in ((0, 1), (1, 1), (1, 1), (1, 2), (1, 4), (1, 2))
    ]
    saved = tmp_path / "out" / "num4_steps2_seed1"
    assert f"{saved}: 4 single pictures" in told
    assert len(list(saved.iterdir())) == 4
    assert told.count(sampling_watch.HELP) == 2  # at the beginning, and for x
    assert figures.read_text(tmp_path / "out" / "watch.png")["steps"] == "2"


def test_a_newer_checkpoint_is_taken(tmp_path):
    told: list[str] = []
    asked = job(tmp_path, num=4)
    in_training = asked._replace(run=Run(tmp_path, asked.pipeline), checkpoint=100)
    sampling_watch.newest(in_training, told.append)
    assert sampling_watch.newest(in_training, told.append).checkpoint == 300
    assert told == ["checkpoint 200", "checkpoint 300"]
    fixed = in_training._replace(options=asked.options._replace(checkpoint="100"))
    assert sampling_watch.newest(fixed, told.append) is fixed
    assert sampling_watch.newest(asked, told.append) is asked  # exported, it has one


@pytest.fixture
def pseudo():
    """A pseudo terminal: what to type to, and what a program reads from."""
    main, other = pty.openpty()
    with os.fdopen(other, "r") as stream:
        yield main, stream
    os.close(main)


def test_keys_of_a_terminal_need_no_enter_and_leave_it_as_it_was(tmp_path, pseudo):
    main, stream = pseudo
    before = termios.tcgetattr(stream)
    os.write(main, b" \x1b[Ar")  # arrow up comes with the space, and is no key
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        raw = not termios.tcgetattr(stream)[3] & (termios.ICANON | termios.ECHO)
        assert raw
        if "seed 1" in line:
            os.write(main, b"2")
        if "steps 2" in line:
            os.write(main, b"q")

    sampling_watch.watch(job(tmp_path, num=4), stream, tell)
    shown = [line.split(": ")[1].partition(", network")[0] for line in told if "png" in line]
    assert shown[:2] == ["seed 0, steps 1", "seed 1, steps 1"]
    assert shown[-1] == "seed 1, steps 2"
    assert termios.tcgetattr(stream) == before


@pytest.mark.parametrize("ends", ["error", "SIGTERM", "SIGHUP", "SIGINT", "control-d"])
def test_a_terminal_is_restored_on_any_way_out(pseudo, ends):
    main, stream = pseudo
    before, handler = termios.tcgetattr(stream), signal.getsignal(signal.SIGTERM)

    def leave() -> None:
        with terminal.keys(stream) as pressed:
            assert termios.tcgetattr(stream) != before
            if ends == "error":
                raise ZeroDivisionError
            if ends == "control-d":
                os.write(main, b"\x04")
                assert list(pressed) == []
            else:
                os.kill(os.getpid(), getattr(signal, ends))
                next(pressed)

    if ends == "control-d":
        leave()
    else:
        with pytest.raises((ZeroDivisionError, SystemExit, KeyboardInterrupt)) as raised:
            leave()
        if ends in ("SIGTERM", "SIGHUP"):
            assert raised.value.code == 128 + getattr(signal, ends)
    assert termios.tcgetattr(stream) == before
    assert signal.getsignal(signal.SIGTERM) == handler


# Mistakes.

MISTAKES: list[tuple[dict, str]] = [
    ({"workdir": ""}, "which model"),
    ({"workdir": "no/where"}, "no/where is no run and no exported model"),
    ({"labels": ("10",)}, "no class 10: there are 0 to 9"),
    ({"labels": ("seven",)}, "no class 'seven': there are 0"),
    ({"labels": ("-2",)}, "no class -2"),
    ({"num": -1}, "--num=-1: from 0 to"),
    ({"batch_size": 0}, "--batch_size=0: from 1 to"),
    ({"steps": (4, 0)}, "--steps=0: from 1 to 10000"),
    ({"seed": -1}, "--seed=-1: from 0 to"),
    ({"first": 2**31 - 3}, "and 16 samples go beyond"),
    ({"num": 20_000}, "20,000 samples are too many for one figure: 10,000 at most; eval_fid.py"),
    ({"guidance": math.nan}, "--guidance=nan: from"),
    ({"guidance_interval": "0.8:0.1"}, "LOW:HIGH within 0:1"),
    ({"sampler": "ddim"}, "no sampler 'ddim': there are meanflow, euler"),
    ({"sampler": "meanflow", "workdir": FLOW}, "needs average velocities"),
    ({"sampler": "dopri5", "steps": (4,)}, "chooses its own steps: leave --steps out"),
    ({"sampler": "dopri5", "grid": ("cosine",)}, "chooses its own times: leave --grid out"),
    ({"sampler": "dopri5", "tolerance": 0.0}, "--tolerance=0: from 1e-07 to 1"),
    ({"sampler": "dopri5", "video": "denoising"}, "dopri5 has none: give another"),
    ({"tolerance": 0.1}, "--tolerance is dopri5's"),
    ({"grid": ("unifrom",)}, "--grid=unifrom: one of uniform, cosine"),
    ({"grid": ("1", "0.5")}, "times that fall from 1 to 0"),
    ({"grid": ("1", "nan", "0")}, "times that fall from 1 to 0"),
    ({"grid": ("1", "0.50000001", "0.5", "0")}, "times that fall from 1 to 0"),  # in float32
    ({"grid": ("1", "0.5", "0"), "steps": (3,)}, "gives 2 steps by its times"),
    ({"checkpoint": "5"}, "has no checkpoint 5"),
    ({"ema": "0.5"}, "leave --ema out"),
    ({"video": "denoising", "steps": (1, 2)}, "shows one step count, not 2"),
    ({"video": "interpolation", "num": 1}, "give --num=2 or more"),
    ({"video": "denoising", "watch": True}, "leave --video out"),
    ({"video": "denoising", "video_seconds": 0.0}, "--video_seconds=0: from 0.1"),
    ({"out": "gs://bucket/out"}, "name a folder of this machine"),
    ({"out": __file__}, "is a file: name a folder"),
]


@pytest.mark.parametrize(("options", "told"), MISTAKES)
def test_a_mistake_is_told_in_a_line_before_anything_is_drawn(options, told):
    with pytest.raises(UserError, match=told) as raised:
        sampling.prepare(Sampling(**{"workdir": MEAN_FLOW} | options))
    assert "\n" not in str(raised.value)


def test_mp4_without_ffmpeg_is_told_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="mp4 needs ffmpeg: install it, or pip install"):
        sampling.check(Sampling(MEAN_FLOW, video="denoising", video_format="mp4"))
