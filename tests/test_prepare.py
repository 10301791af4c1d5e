"""prepare_data.py: what it stores is what the autoencoder gives, whatever happens on the way."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from pipelines import prepare, prepare_report
from pipelines.prepare import Plan
from pipelines.pretrained import load_autoencoder
from tests.small import write_autoencoder, write_pictures
from utils import shards
from utils.cli import UserError
from utils.pictures import open_pictures
from utils.sources import centre_crop

ROOT = pathlib.Path(__file__).parents[1]
COUNT, SIDE, SHARD = 100, 16, 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> pathlib.Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), COUNT)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> pathlib.Path:
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture
def plan(pictures, autoencoder, tmp_path) -> Plan:
    """Small pictures with the tiny autoencoder, into a folder that is not there yet."""
    return Plan(
        str(pictures), str(tmp_path / "out"), str(autoencoder), image_size=SIDE, shard_size=SHARD
    )


def to(plan: Plan, name: str, **changes) -> Plan:
    """The plan with another folder beside its own."""
    return plan._replace(out=str(pathlib.Path(plan.out).with_name(name)), **changes)


def records(out: str) -> list[bytes]:
    """All records of a complete folder, in order."""
    card = shards.read_card(out)
    paths = [shards.shard_path(out, card, k) for k in range(card.shards)]
    return [record for path in paths for chunk in shards.Shard(path).chunks() for record in chunk]


def complaint(call, *args) -> str:
    """The one line that `call` ends in."""
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is stored.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_moments_are_the_autoencoders_of_the_cropped_and_of_the_mirrored_picture(plan, dtype):
    told = prepare.prepare(plan._replace(flip=True, dtype=dtype))
    source = shards.MomentsSource(plan.out)
    assert source.card.content in told and len(source) == source.card.count == COUNT
    files = sorted(pathlib.Path(plan.source).glob("*/*.jpg"))
    crops = np.stack([centre_crop(Image.open(f).convert("RGB"), SIDE) for f in files])
    model = load_autoencoder(plan.autoencoder).autoencoder
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2}[dtype]
    for mirrored in (False, True):
        got = source.gather(range(COUNT), np.full(COUNT, mirrored))
        wanted = jax.jit(model.moments)(crops[:, :, ::-1] if mirrored else crops)
        assert got["x"].shape == wanted.shape == (COUNT, SIDE // 2, SIDE // 2, 8)
        np.testing.assert_allclose(got["x"].astype(np.float32), wanted, tolerance, tolerance)
        assert got["label"].tolist() == ["abc".index(f.parent.name) for f in files]
    np.testing.assert_array_equal(source.keys, open_pictures(plan.source).keys)
    mean = source.gather(range(COUNT))["x"][..., :4].astype(np.float64)
    np.testing.assert_allclose(source.card.mean, mean.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(source.card.std, mean.std((0, 1, 2)), rtol=1e-4)


def test_the_copy_of_the_autoencoder_is_the_one_the_card_names(plan):
    prepare.prepare(plan._replace(num=3))
    card = shards.read_card(plan.out)
    copy = load_autoencoder(str(pathlib.Path(plan.out) / "autoencoder"))
    assert card.autoencoder == {
        "name": plan.autoencoder,
        "fingerprint": copy.fingerprint,
        "compute_dtype": "float32",
    }
    assert card.count == card.source_count == 3 and card.shards == 1


def test_one_device_stores_what_eight_do(plan, monkeypatch):
    prepare.prepare(plan)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    prepare.prepare(to(plan, "one"))
    eight, one = (shards.MomentsSource(out) for out in (plan.out, to(plan, "one").out))
    everything = range(COUNT)
    a, b = (s.gather(everything)["x"].astype(np.float32) for s in (eight, one))
    np.testing.assert_allclose(a, b, 2e-3, 2e-3)
    np.testing.assert_array_equal(eight.keys, one.keys)


def test_pictures_are_kept_as_they_are_where_the_crop_changes_nothing(tmp_path):
    folder, rng = tmp_path / "mixed", np.random.default_rng(0)
    folder.mkdir()
    noise = Image.fromarray(rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8))
    noise.save(folder / "a.jpg")
    noise.convert("L").save(folder / "b.png")
    noise.convert("P").save(folder / "c.png")
    noise.resize((50, 33)).save(folder / "d.jpg")
    plan = Plan(str(folder), str(tmp_path / "out"), "none", image_size=SIDE)
    prepare.prepare(plan)
    kept, files = shards.open_shards(plan.out, "folder"), sorted(folder.iterdir())
    assert [kept.read(i)[0] == f.read_bytes() for i, f in enumerate(files)] == [1, 1, 0, 0]
    for i, file in enumerate(files):
        stored = Image.open(io.BytesIO(kept.read(i)[0])).convert("RGB")
        wanted = centre_crop(Image.open(file).convert("RGB"), SIDE)
        np.testing.assert_array_equal(np.asarray(stored), np.asarray(wanted))
    np.testing.assert_array_equal(kept.keys, open_pictures(plan.source).keys)


def test_prepared_pictures_give_the_moments_of_their_source(plan):
    prepare.prepare(plan)
    kept = to(plan, "pictures", autoencoder="none", dataset_name="imagenet256")
    prepare.prepare(kept)
    again = to(plan, "again", source=kept.out)
    prepare.prepare(again)
    assert records(again.out) == records(plan.out)
    assert shards.read_card(again.out).dataset_name == "imagenet256"
    other = to(plan, "other", source=kept.out, image_size=32)
    assert "was prepared at 16 pixels, not 32" in complaint(prepare.prepare, other)


# Interruptions and several processes, as real processes.


def start(plan: Plan) -> subprocess.Popen:
    """Runs prepare_data.py with the plan's flags; as many devices as here."""
    given = {k: v for k, v in plan._asdict().items() if v != Plan._field_defaults.get(k)}
    flags = [f"--{k}={str(v).lower() if v is True else v}" for k, v in given.items()]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".pytest_cache" / "jax")
    command = [sys.executable, str(ROOT / "prepare_data.py"), *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finished(out: str) -> int:
    """How many shards are there."""
    return len(list(pathlib.Path(out).glob("shard-*")))


def kill_after(plan: Plan, count: int, seconds: float) -> bool:
    """Kills a run some time after it has made `count` shards; False if it was done by then."""
    process, before = start(plan), finished(plan.out)
    while process.poll() is None and finished(plan.out) < before + count:
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def large_pictures(tmp_path_factory) -> pathlib.Path:
    """One picture of 1200 pixels a side under 100 names, which takes a while to read."""
    root, coarse = tmp_path_factory.mktemp("large"), np.random.default_rng(0).random((9, 9, 3))
    Image.fromarray((255 * coarse).astype(np.uint8)).resize((1200, 1200)).save(root / "000.jpg")
    for i in range(1, COUNT):
        os.link(root / "000.jpg", root / f"{i:03d}.jpg")
    return root


@pytest.mark.parametrize(("kind", "kills"), [("none", 2), ("tiny", 3)])
def test_killed_runs_leave_what_one_run_makes(plan, kind, kills, large_pictures):
    plan = plan._replace(source=str(large_pictures))
    plan = plan._replace(autoencoder="none") if kind == "none" else plan._replace(flip=True)
    killed, rng = to(plan, "killed"), np.random.default_rng(0)
    for _ in range(kills):
        assert kill_after(killed, int(rng.integers(1, 3)), rng.uniform(0, 0.02))
        there = finished(killed.out)
        line = complaint(shards.read_card, killed.out)
        assert f"is unfinished: {there} of 13 shards are there: run the same" in line
    process = start(killed)
    out, err = process.communicate()
    assert process.returncode == 0, err
    prepare.prepare(plan)
    assert shards.read_card(plan.out).content in out
    assert records(killed.out) == records(plan.out)
    cards = [shards.read_card(p.out) for p in (plan, killed)]
    assert cards[0] == cards[1] and cards[0].count == COUNT
    index = [np.load(pathlib.Path(p.out) / "index.npy") for p in (plan, killed)]
    np.testing.assert_array_equal(*index)
    assert len(set(index[0]["key"])) == COUNT
    assert not list(pathlib.Path(killed.out).glob(".*")), "leftovers of killed runs"


def test_two_processes_at_once_make_exactly_the_whole(plan):
    both = to(plan, "both")
    processes = [start(both._replace(share=f"{i}/2")) for i in range(2)]
    told = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert any("is complete" in out for out, _ in told)
    prepare.prepare(plan)
    assert records(both.out) == records(plan.out)
    assert shards.read_card(both.out) == shards.read_card(plan.out)


# Shares and restarts, in this process.


def test_shares_make_their_shards_alone_and_the_last_completes(plan):
    assert "share 1/3" in prepare.prepare(plan._replace(share="1/3"))
    card = shards.read_card(plan.out, complete=False)
    assert [k for k in range(13) if k not in shards.missing_shards(plan.out, card)] == [1, 4, 7, 10]
    assert "9 of 13 shards" in prepare.prepare(plan._replace(share="0/3"))
    assert "is complete" in prepare.prepare(plan._replace(share="2/3"))
    prepare.prepare(to(plan, "whole"))
    assert records(plan.out) == records(to(plan, "whole").out)


def test_a_finished_folder_is_left_alone(plan):
    told = prepare.prepare(plan._replace(autoencoder="none"))
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path(plan.out).iterdir()}
    moved = shutil.copytree(plan.source, pathlib.Path(plan.out).with_name("moved"))
    assert prepare.prepare(plan._replace(autoencoder="none", source=str(moved))) == told
    assert {path: path.stat().st_mtime_ns for path in pathlib.Path(plan.out).iterdir()} == before


def test_a_damaged_shard_is_found_at_the_end_and_made_anew(plan):
    plan = plan._replace(autoencoder="none")
    prepare.prepare(plan._replace(share="0/2"))
    card = shards.read_card(plan.out, complete=False)
    path = shards.shard_path(plan.out, card, 4)
    path.write_bytes(path.read_bytes()[:-50])
    line = complaint(prepare.prepare, plan._replace(share="1/2"))
    assert f"{path} is damaged" in line and "delete it and run the same" in line
    other = shards.shard_path(plan.out, card, 5)
    path.write_bytes(other.read_bytes())
    assert f"{path} is not of {plan.source}" in complaint(prepare.prepare, plan)
    path.unlink()
    prepare.prepare(plan)
    before = shards.read_card(plan.out)
    path.unlink()  # from a complete folder, which it is no longer
    other.unlink()
    assert "12 of 13 shards" in prepare.prepare(plan._replace(share="0/5"))
    assert "is unfinished" in complaint(shards.open_shards, plan.out, "folder")
    prepare.prepare(plan)
    assert shards.read_card(plan.out) == before
    prepare.prepare(to(plan, "whole"))
    assert records(plan.out) == records(to(plan, "whole").out)


# Corrupt pictures and moments.


def test_a_corrupt_picture_stops_the_work_or_is_left_out(plan, capsys):
    source = shutil.copytree(plan.source, pathlib.Path(plan.out).with_name("damaged"))
    bad = sorted(source.glob("*/*.jpg"))[50]
    bad.write_bytes(bad.read_bytes()[:-300])
    plan = plan._replace(source=str(source))
    line = complaint(prepare.prepare, plan)
    assert f"{bad} is no readable picture" in line and "--skip_corrupt" in line
    assert finished(plan.out) == 50 // SHARD  # all before it
    assert "99 pictures, 1 corrupt ones left out" in prepare.prepare(
        plan._replace(skip_corrupt=True)
    )
    assert f"left out: {bad} is no readable picture" in capsys.readouterr().err
    card = shards.read_card(plan.out)
    assert card.skipped == (bad.relative_to(source).as_posix(),) and card.count == 99
    stored = shards.MomentsSource(plan.out)
    keys = open_pictures(str(source)).keys
    np.testing.assert_array_equal(stored.keys, np.delete(keys, 50))
    whole = to(plan, "whole", source=str(bad.parents[1].with_name("damaged")), skip_corrupt=True)
    prepare.prepare(whole)
    assert records(whole.out) == records(plan.out)


@pytest.mark.parametrize(
    ("bias", "told"), [(1e6, "overflow float16: give --dtype=bfloat16"), (np.nan, "not finite")]
)
def test_moments_that_cannot_be_stored_name_the_picture(plan, tmp_path, bias, told):
    folder = tmp_path / "large"
    folder.mkdir()
    write_autoencoder(folder, bias)
    plan = plan._replace(autoencoder=str(folder), num=5)
    line = complaint(prepare.prepare, plan)
    assert told in line and "000.jpg" in line and finished(plan.out) == 0
    if np.isfinite(bias):
        assert "is complete" in prepare.prepare(to(plan, "wide", dtype="bfloat16"))


# Mistakes.


def test_other_options_for_the_same_folder_are_refused(plan, tmp_path):
    plan = plan._replace(num=10)
    prepare.prepare(plan)
    other, extra = tmp_path / "other", tmp_path / "extra"
    other.mkdir()
    write_autoencoder(other, bias=1e-3)
    shutil.copytree(plan.source, extra)
    next(extra.glob("b/*")).rename(extra / "b" / "new.jpg")
    changes = {
        "source fingerprint": {"source": str(extra)},
        "dataset name folder, not celebahq256": {"dataset_name": "celebahq256"},
        f"autoencoder {plan.autoencoder}": {"autoencoder": str(other)},
        "compute dtype float32, not bfloat16": {"compute_dtype": "bfloat16"},
        "kind moments, not pictures": {"autoencoder": "none"},
        "dtype float16, not bfloat16": {"dtype": "bfloat16"},
        "flipped False, not True": {"flip": True},
        "image size 16, not 32": {"image_size": 32},
        "source count 10, not 11": {"num": 11},
        "shard size 8, not 4": {"shard_size": 4},
    }
    for told, change in changes.items():
        line = complaint(prepare.prepare, plan._replace(**change))
        assert line.startswith(f"{plan.out} was begun with {told}") and "--out" in line
    content = shards.read_card(plan.out).content
    assert content in prepare.prepare(plan._replace(num=10, batch_size=16, skip_corrupt=True))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"share": "2/2"}, "--share=2/2: give I/N"),
        ({"share": "half"}, "--share=half: give I/N"),
        ({"share": "0/0"}, "--share=0/0: give I/N"),
        ({"source": ""}, "give --source="),
        ({"source": "nowhere"}, "nowhere"),
        ({"autoencoder": "nowhere"}, "nowhere"),
        ({"image_size": 15}, "image_size 15 does not fit"),
        ({"image_size": 0}, "--image_size=1 or more"),
        ({"batch_size": 3}, "batch_size 3 cannot be shared by 8 devices: give --batch_size=8"),
        ({"autoencoder": "none", "flip": True}, "leave --flip out"),
    ],
)
def test_mistakes_are_told_in_a_line(plan, change, told):
    assert told in complaint(prepare.prepare, plan._replace(**change))


def test_a_folder_with_something_else_is_not_written_to(plan, pictures):
    assert "holds something else" in complaint(prepare.prepare, plan._replace(out=str(pictures)))
    assert "has no card.json: give a folder that prepare_data.py" in complaint(
        prepare_report.write, Plan("", str(pictures), "none")
    )


def test_an_unknown_dtype_is_told_by_the_command(plan):
    process = start(plan._replace(dtype="float8"))
    _, err = process.communicate()
    assert process.returncode == 2 and err.count("\n") == 1
    assert "--dtype=float8: float16 or bfloat16" in err


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("imagenet2012", "imagenet256"),
        ("data/imagenet2012/5.1.0", "imagenet256"),
        ("imagenet2012:5.1.0", "imagenet256"),
        ("celeb_a_hq/256", "celebahq256"),
        ("tfds/celebahq256/1.0.0/", "celebahq256"),
        ("pictures/celeb.zip", "folder"),
    ],
)
def test_the_name_of_a_source_says_what_its_labels_are(source, name):
    assert prepare.dataset_name_of(source) == name


# The report.


def test_the_report_is_written_during_the_work_and_after_it(plan):
    prepare.prepare(plan._replace(share="0/2"))
    path = prepare_report.write(Plan("", plan.out, ""))
    assert "unfinished: 7 of 13 shards" in path.read_text()
    prepare.prepare(plan)
    text = prepare_report.write(Plan("", plan.out, "")).read_text()
    card = shards.read_card(plan.out)
    assert card.content in text and "complete: 13 of 13 shards" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.count(" | ") == 4]
    raw = np.array([[float(cell) for cell in row[1:3]] for row in rows[2:]])
    np.testing.assert_allclose(raw, np.transpose([card.mean, card.std]), atol=2e-3)
    # Pairs of 16 pixels, enlarged three times, with a gap of 2.
    with Image.open(path.with_name("report.png")) as sheet:
        assert sheet.size == (4 * 50 + 2, 4 * 50 + 2)
    assert path.with_name("report_channels.png").is_file()


def test_a_report_of_pictures_shows_them(plan):
    plan = plan._replace(autoencoder="none", num=20)
    prepare.prepare(plan)
    text = prepare_report.write(plan).read_text()
    assert "| records in all | 20 |" in text and "PSNR" not in text
    moved = dataclasses.replace(shards.read_card(plan.out), source_fingerprint="0" * 12)
    shards.write_card(plan.out, moved)
    assert "was not prepared from" in complaint(prepare_report.write, plan)


def test_the_same_numbers_in_other_files_are_the_same_autoencoder(plan, autoencoder, tmp_path):
    prepare.prepare(plan._replace(share="0/2"))
    other = shutil.copytree(autoencoder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"_name_or_path": "elsewhere"}
    (other / "config.json").write_text(json.dumps(config))
    assert "is complete" in prepare.prepare(plan._replace(autoencoder=str(other)))
    write_autoencoder(pathlib.Path(plan.out) / "autoencoder", bias=1.0)
    line = complaint(prepare.prepare, plan)
    assert "is another autoencoder: remove it" in line


def test_nothing_readable_is_no_data(plan, tmp_path):
    source = tmp_path / "pictures"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.jpg").write_bytes(b"no picture")
    line = complaint(prepare.prepare, plan._replace(source=str(source), skip_corrupt=True))
    assert "none of the 3 pictures can be read" in line
