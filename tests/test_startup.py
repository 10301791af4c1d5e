"""From the command to the first step: what is imported, kept, and compiled ahead."""

import os
import pathlib
import subprocess
import sys

import pytest

from utils import compilation

ROOT = pathlib.Path(__file__).parents[1]
KEPT = """
import os
from utils import compilation
compilation.keep()
print(os.environ.get("JAX_COMPILATION_CACHE_DIR", "-"))
"""
# Compiles, forgets, and compiles again; PRINTS what a second look-up found on disk.
TWICE = """
import os, pathlib, sys
from utils import compilation
compilation.keep()
import jax
f = jax.jit(lambda x: jax.numpy.sort(x @ x))
x = jax.numpy.ones((8, 8))
folder = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
entries = lambda: {p.name: p.read_bytes() for p in folder.glob("jit__lambda-*-cache")}
first, was = f(x), entries()
for spoilt in (b"", b"garbage", *(value[:-9] for value in was.values())):
    for name in was:
        (folder / name).write_bytes(spoilt)
    jax.clear_caches()
    assert (f(x) == first).all()
    assert entries().keys() == was.keys(), "it was not written again"
    assert spoilt not in entries().values(), "it is as it was"
print(len(was))
"""


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs code as a user's process: without the variables that the tests set."""
    names = (compilation.FOLDER, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XDG_CACHE_HOME")
    surroundings = {k: v for k, v in os.environ.items() if k not in names}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=surroundings | variables,
        capture_output=True,
        text=True,
    )


def kept(**variables: str) -> tuple[str, str]:
    """Where programs are kept, and what is said."""
    done = python(KEPT, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


# Programs on disk.


def test_programs_lie_in_the_users_cache_apart_by_processor(tmp_path):
    place, said = kept(XDG_CACHE_HOME=str(tmp_path))
    assert place == str(tmp_path / "flow-meanflow" / compilation.processor()) and not said
    assert pathlib.Path(place).stat().st_mode & 0o077 == 0  # what lies there is executed
    place, said = kept(HOME=str(tmp_path), XDG_CACHE_HOME="not/absolute")
    assert place.startswith(str(tmp_path / ".cache" / "flow-meanflow")) and not said


def test_the_user_names_another_folder_or_none(tmp_path):
    home = {"HOME": str(tmp_path)}
    assert kept(**home, JAX_COMPILATION_CACHE_DIR="elsewhere") == ("elsewhere", "")
    assert kept(**home, JAX_COMPILATION_CACHE_DIR="") == ("", "")
    assert kept(**home, JAX_ENABLE_COMPILATION_CACHE="false") == ("-", "")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told_in_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    place, said = kept(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert place == "-"
    assert said.startswith("warning: compiled programs are not kept") and said.count("\n") == 1
    assert "JAX_ENABLE_COMPILATION_CACHE=false" in said


def test_entries_that_are_cut_short_are_replaced_in_silence(tmp_path):
    quick = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XDG_CACHE_HOME": str(tmp_path)}
    done = python(TWICE, **quick)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", ""), done.stderr


def test_a_folder_that_fails_later_is_told_once(tmp_path):
    (tmp_path / "file").write_text("")
    code = TWICE.partition("folder = ")[0] + "print(f(x)[0, 0], f(x[:4, :4])[0, 0])"
    done = python(code, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "file"))
    assert (done.returncode, done.stdout) == (0, "8.0 4.0\n")
    assert done.stderr.startswith("warning: compiled programs") and done.stderr.count("\n") == 1


def test_what_was_used_longest_ago_goes_first(tmp_path):
    for day, name in enumerate(["a/oldest-cache", "b/older-cache", "b/newest-cache"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (86400 * day, 0))
    compilation.prune(tmp_path, limit=250)
    assert sorted(p.name for p in tmp_path.rglob("*-cache")) == ["newest-cache", "older-cache"]
    compilation.prune(tmp_path, limit=100)
    assert sorted(p.name for p in tmp_path.rglob("*-cache")) == ["newest-cache"]


# Imports.

HEAVY = ("tensorflow", "tensorflow_datasets", "torch", "diffusers", "grain", "matplotlib")
HEAVY += ("sklearn", "scipy", "huggingface_hub", "wandb", "array_record")


@pytest.mark.parametrize("name", ["pipelines.train", "eval_fid", "prepare_data"])
def test_nothing_heavy_is_imported_before_it_is_used(name):
    done = python(f"import sys, {name}; print(*sorted(m for m in sys.modules if '.' not in m))")
    assert done.returncode == 0, done.stderr
    assert not set(HEAVY) & set(done.stdout.split())


@pytest.mark.parametrize("name", ["train_flow", "train_meanflow"])
def test_help_does_without_jax(name):
    done = python(f"import sys, {name}; print('jax' in sys.modules)")
    assert done.stdout == "False\n", done.stderr
