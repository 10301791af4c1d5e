"""Checkpoints: what is damaged is known, named and set aside; what cannot be written is told."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from utils.checkpoint import Checkpoints, check, checksums
from utils.cli import UserError
from utils.sharding import abstract_state, make_mesh

ROOT = pathlib.Path(__file__).parents[1]


def parts(number: int) -> dict:
    """A state with arrays of several types, all a function of `number`."""
    keys = jax.random.split(jax.random.key(number), 2)
    return {
        "ema": {"0.9": {"w": jax.random.normal(keys[0], (64, 32)), "b": jnp.ones(3, jnp.bfloat16)}},
        "train": {"step": jnp.int32(number), "w": jax.random.normal(keys[1], (64, 32))},
    }


def abstract(mesh=None) -> dict:
    return abstract_state(lambda: parts(0), mesh or make_mesh())


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> pathlib.Path:
    """A folder with checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("three")
    with Checkpoints(folder, keep=3, keep_best=1) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save(number, parts(number), score=float(number), position=number)
    return folder


def test_a_checksum_is_of_values_and_places_and_knows_no_mesh():
    x = jax.random.normal(jax.random.key(0), (8, 64))
    plain = checksums({"x": x})
    for mesh in (make_mesh(8, 1), make_mesh(2, 4)):
        for spec in (PartitionSpec("data"), PartitionSpec("fsdp", "data"), PartitionSpec()):
            assert checksums({"x": jax.device_put(x, NamedSharding(mesh, spec))}) == plain
    a = np.asarray(x)
    # An independent statement of it, in whole numbers.
    words = a.ravel().view(np.uint32).astype(object)
    assert plain["x"][""] == sum((2 * i + 1) * int(w) for i, w in enumerate(words)) % 2**32
    for place in [(0, 0), (3, 17), (7, 63)]:
        for bit in range(32):
            flipped = a.copy()
            flipped.view(np.uint32)[place] ^= np.uint32(1 << bit)
            assert checksums({"x": jnp.asarray(flipped)}) != plain
    assert checksums({"x": jnp.asarray(a[::-1].copy())}) != plain


def test_metadata_without_a_checksum_for_each_array_is_refused():
    x = {"a": {"w": jnp.ones(3)}}
    check({"checksums": checksums(x)}, x)
    check({"samples_consumed": 5}, x)  # of before there were checksums
    for stored in (None, {}, {"checksums": {}}, {"checksums": {"a": {"w": 1}}}):
        with pytest.raises((ValueError, KeyError)):
            check(stored, x)


def files_of(folder: pathlib.Path, step: int) -> list[str]:
    place = folder / "checkpoints" / str(step)
    return sorted(str(p.relative_to(folder)) for p in place.rglob("*") if p.is_file())


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {"removed": pathlib.Path.unlink, "flipped": flip, "cut": cut}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_one_file_of_the_newest_can_be_damaged(three, tmp_path, damage, capsys):
    """Each file in turn: the values are those of 3 or, told in a line, those of 2; never others."""
    back = 0
    names = files_of(three, 3)
    assert len(names) > 12
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(three, folder)
        DAMAGES[damage](folder / name)
        with Checkpoints(folder, keep=3) as checkpoints:
            found = checkpoints.restore_newest(abstract())
            told = capsys.readouterr().err
            step = int(found["train"]["step"])
            assert checksums(found) == checksums(parts(step)), name
            assert checkpoints.latest == step, name
            assert step == 3 or ("checkpoint 3 is damaged: moved to" in told and step == 2), name
            assert (folder / "damaged" / "3").exists() == (step == 2)
            if step == 2:
                back += 1
                checkpoints.save(3, parts(3))  # its place is free again
        assert files_of(folder, 2) == files_of(three, 2)
    print(f"{len(names)} files {damage}: {back} times the one before")  # shown by pytest -rP
    assert back > len(names) // 3  # what is damaged matters


def test_one_damage_after_another_goes_back_to_the_first(three, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(three, folder)
    for step in (2, 3):
        shutil.rmtree(folder / "checkpoints" / str(step) / "train")
    with Checkpoints(folder, keep=3) as checkpoints:
        assert int(checkpoints.restore_newest(abstract())["train"]["step"]) == 1
        assert checkpoints.steps == (1,)
    assert "going on from checkpoint 1" in capsys.readouterr().err


def test_where_none_can_be_read_all_stay(three, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(three, folder)
    for step in (1, 2, 3):
        shutil.rmtree(folder / "checkpoints" / str(step) / "train")
    with Checkpoints(folder, keep=3) as checkpoints:
        with pytest.raises(UserError, match=r"none of 3 checkpoints can be read: .*checkpoints/3"):
            checkpoints.restore_newest(abstract())
        assert checkpoints.steps == (1, 2, 3)


def test_restored_onto_any_mesh(three):
    with Checkpoints(three) as checkpoints:
        for mesh in (make_mesh(8, 1), make_mesh(2, 4), make_mesh(1, 1, jax.devices()[:1])):
            found = checkpoints.restore(abstract(mesh))
            assert checksums(found) == checksums(parts(3))


def test_the_average_is_read_without_the_rest(three, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(three, folder)
    shutil.rmtree(folder / "checkpoints" / "3" / "train")
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore({"ema": abstract()["ema"]})
    assert checksums(found)["ema"] == checksums(parts(3))["ema"]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
        for number, score in enumerate([5.0, 1.0, 3.0, 4.0, None, 2.0], start=1):
            checkpoints.save(number, parts(number), score)
    with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
        assert checkpoints.steps == (2, 5, 6) and checkpoints.best == 2
        checkpoints.save(7, parts(7), 0.5)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == (6, 7) and checkpoints.best == 7


FULL = """
import os, sys, time
import jax, jax.numpy as jnp
from utils.checkpoint import Checkpoints
from utils.cli import UserError
folder = sys.argv[1]
make = lambda step: {"a": {"w": jax.random.normal(jax.random.key(step), (250_000,))}}
with Checkpoints(folder, keep=1, patience=float(sys.argv[2])) as checkpoints:
    checkpoints.save(1, make(1))
    assert checkpoints.settle() == ""
    ballast = os.path.join(folder, "ballast")
    with open(ballast, "wb") as file:
        file.write(bytes(1_500_000))
    checkpoints.save(2, make(2))
    try:
        print("settled", checkpoints.settle())
    except UserError as error:
        print("gave up:", error)
    assert checkpoints.steps == (1,), checkpoints.steps
    checkpoints.restore(jax.eval_shape(lambda: make(1)))
    try:
        checkpoints.save_now(3, make(3))
    except UserError as error:
        print("refused:", error)
    os.remove(ballast)
    checkpoints.save_now(4, make(4))
    print("steps", checkpoints.steps)
with Checkpoints(folder, keep=1):
    assert os.listdir(os.path.join(folder, "checkpoints")) == ["4"]  # nothing half written
"""


def on_a_small_disk(script: str, *arguments: str, folder: pathlib.Path, size: str):
    """Runs a Python script with `folder` as a file system of its own, of `size`."""
    line = f'mount -t tmpfs -o size={size} none "$1" && shift && exec "$@"'
    words = ["unshare", "-Urm", "sh", "-c", line, "sh", str(folder), sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*words, str(folder), *arguments], capture_output=True, text=True, env=environment
    )


needs_small_disks = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode != 0,
    reason="this system lets users make no file systems of their own (unshare -Urm)",
)


@needs_small_disks
@pytest.mark.parametrize("patience", ["1e9", "0"])
def test_a_full_disk_costs_that_save_alone(tmp_path, patience):
    result = on_a_small_disk(FULL, patience, folder=tmp_path, size="3m")
    assert result.returncode == 0, result.stdout + result.stderr
    expected = "settled No space left on device" if patience == "1e9" else "gave up: no checkpoint"
    assert expected in result.stdout
    lines = result.stderr.splitlines()
    assert "warning: checkpoint 2 could not be saved (No space left on device)" in lines
    assert all(line.startswith("warning: ") for line in lines), result.stderr
    if patience == "1e9":
        assert "refused: checkpoint 3 could not be saved (No space left" in result.stdout
        assert "goes on from step 1" in result.stdout
    assert "steps (4,)" in result.stdout


HOSTILE = {  # of strangers: what stands in a file, and what takes its place
    "a handler that runs code": (
        "_CHECKPOINT_METADATA",
        "orbax.checkpoint.experimental",
        "os.system",
    ),
    "a type that is none": ("ema/_METADATA", '"jax.Array"', '"builtins.eval"'),
    "a key that leaves the tree": ("ema/_METADATA", '"key": "w"', '"key": "../../../train/w"'),
    "shapes of terabytes": ("ema/_METADATA", "[64, 32]", "[64000000, 32000000]"),
    "checksums that are none": ("_CHECKPOINT_METADATA", '"checksums": {', '"checksums": 1, "x": {'),
    "metadata without end": ("_CHECKPOINT_METADATA", '"position": 3', '"x": ' + "[" * 10**5),
}


@pytest.mark.parametrize(("file", "old", "new"), HOSTILE.values(), ids=HOSTILE)
def test_a_strangers_checkpoint_is_read_as_it_was_saved_or_not_at_all(
    three, tmp_path, file, old, new
):
    folder = tmp_path / "run"
    shutil.copytree(three, folder)
    path = folder / "checkpoints" / "3" / file
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))
    before = sorted(tmp_path.rglob("*"))
    try:
        with Checkpoints(folder) as checkpoints:
            found = checkpoints.restore({"ema": abstract()["ema"]}, 3)
        assert checksums(found)["ema"] == checksums(parts(3))["ema"]
    except UserError as error:
        assert "checkpoints" in str(error)
    assert sorted(tmp_path.rglob("*")) == before
