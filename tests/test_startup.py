"""From the command to the first step: what is imported, kept, and compiled ahead."""

import contextlib
import functools
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits, toy
from flows.samplers import grid_of
from models.autoencoder import Autoencoder
from pipelines import build, measure, objectives
from pipelines.extractors import Extractor
from pipelines.flow import FlowPipeline, make_sampler, noise_of, numbers_of
from pipelines.train import abstract_arguments, train
from utils import compilation, data, sharding
from utils.feed import feed
from utils.sharding import batch_sharding, make_mesh, replicated
from utils.sources import ArraySource

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


def test_several_processes_keep_programs_only_where_the_user_says(tmp_path):
    code = KEPT.replace("keep()", "keep(); compilation.keep_none_at_home()", 1)
    code += f'print(os.environ.get("{compilation.SWITCH}"))'
    done = python(code, XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.split() == ["-", "false"], done.stderr
    done = python(code, JAX_COMPILATION_CACHE_DIR="shared")
    assert done.stdout.split() == ["shared", "None"], done.stderr
    inside = str(tmp_path / "flow-meanflow-shared")  # begins as the folder at home does
    done = python(code, XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=inside)
    assert done.stdout.split() == [inside, "None"], done.stderr


# Compiled ahead.


@contextlib.contextmanager
def compiled() -> Iterator[list[str]]:
    """The names of the functions that are compiled, or found on disk, inside."""
    names: list[str] = []

    def hear(event: str, _: float, **about) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about["fun_name"].removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)


def total(x):
    return x["x"] + x["x"].sum()


X = {"x": jax.ShapeDtypeStruct((4,), jnp.float32)}


def test_what_is_compiled_ahead_is_what_runs():
    """One program, and it takes what it is given, as the ordinary call does."""
    call = compilation.Ahead(jax.jit(total, donate_argnums=0))
    with compiled() as names:
        call.prepare(X)
        x = {"x": jnp.arange(4.0)}
        assert call(x).tolist() == [6, 7, 8, 9]
        assert x["x"].is_deleted()
        assert call({"x": jnp.ones(4)}).tolist() == [5, 5, 5, 5]
    assert names.count("total") == 1


@pytest.mark.parametrize("shape", [(4, 2), (5,), ()])
def test_other_arguments_are_compiled_as_ever(shape):
    call = compilation.Ahead(jax.jit(total))
    call.prepare(X)
    assert call({"x": jnp.ones(shape)}).shape == shape
    assert call({"x": jnp.ones(4)}).shape == (4,)


def test_arguments_elsewhere_are_compiled_as_ever():
    mesh = make_mesh()
    call = compilation.Ahead(jax.jit(total))
    call.prepare({"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=batch_sharding(mesh))})
    x = jax.device_put(jnp.arange(8.0), replicated(mesh))
    assert call({"x": x}).tolist() == [28, 29, 30, 31, 32, 33, 34, 35]


def test_errors_of_tracing_and_of_compiling_are_raised_to_the_caller():
    with pytest.raises(TypeError, match="incompatible shapes"):
        compilation.Ahead(jax.jit(lambda x: x["x"] - jnp.ones(3))).prepare(X)

    def lacking(x):
        return jax.ffi.ffi_call("no_such_program", X["x"])(x["x"])

    with pytest.raises(Exception, match="no_such_program") as plain:
        jax.jit(lacking)({"x": jnp.ones(4)})
    call = compilation.Ahead(jax.jit(lacking))
    call.prepare(X)
    with pytest.raises(plain.type, match="no_such_program"):
        call({"x": jnp.ones(4)})


@pytest.mark.usefixtures("standard_promotion")
def test_a_run_compiles_its_step_once(tmp_path, monkeypatch):
    """The one compiled ahead: for fresh parameters, for restored ones, and for every batch."""
    monkeypatch.setattr(sharding, "SMALLEST", 1)  # so that fsdp splits small arrays
    config = toy.get_config("spirals")
    config.model.update({"depth": 1, "hidden_size": 16})
    config.optimizer.update({"schedule": "constant"})
    config.sample.update({"steps": (1,), "num": 8})
    config.update({"cache": "device", "batch_size": 16})
    config.mesh.fsdp = 2
    for steps in (2, 4):
        config.max_steps = steps
        with compiled() as names:
            train(config, str(tmp_path), objectives.flow_objective)
        assert names.count("step") == 1, names


@pytest.mark.parametrize("cache", ["disk", "device"])
def test_a_batch_of_pictures_is_as_it_was_said_to_be(cache):
    config = digits.get_config()
    dataset, mesh = data.load(config), make_mesh(-1, 2)
    network = build.network(config, dataset.shape, dataset.num_classes)
    _, said = abstract_arguments(config, dataset, network, mesh)
    batch = next(feed(dataset.train, mesh, cache=cache, batch_size=128, seed=0, flip=False)(0))
    assert batch.keys() == said.keys()
    for name, array in batch.items():
        assert (array.shape, array.dtype) == (said[name].shape, said[name].dtype)
        assert array.sharding.is_equivalent_to(said[name].sharding, array.ndim)


# Sampling and evaluation.


@functools.cache
def pipeline() -> FlowPipeline:
    """A small network with guidance, around parameters of one device."""
    config = digits.get_config()
    config.objective = "flow_matching"
    config.model.update({"depth": 1, "hidden_size": 16, "num_heads": 2, "unroll": 1})
    card = {"shape": [8, 8, 1], "num_classes": 10, "flops_per_step": 1, "train_steps": 5}
    built = FlowPipeline.build(config, card)
    return built.with_params(built.network.init(jax.random.key(0)))


def test_features_are_compiled_while_samples_are_and_once():
    """For what the sampler gives, wherever its pictures lie."""

    def mean(params, pictures):
        return {"pool": pictures.mean((1, 2), dtype=jnp.float32) * params}

    apply = jax.tree_util.Partial(mean, jnp.float32(2))
    extractor = Extractor("mean", "", "", "mean", apply, {"pool": 1})
    with compiled() as names:
        measure.prepare([extractor], 12, (8, 8, 1))  # two for each of eight devices
        pictures, *_ = pipeline().draw(np.zeros(12, np.int32))
        applies = jax.device_put((apply,), replicated(make_mesh()))
        found = measure.features_of(applies, pictures)[0]["pool"]
    assert names.count("features_of") == 1
    np.testing.assert_allclose(found, 2 * np.asarray(pictures).mean((1, 2)), rtol=1e-6)


def test_parameters_are_put_on_the_devices_once():
    one = pipeline()
    placed = one._placed(make_mesh())
    assert placed is one._placed(make_mesh())
    for array in jax.tree.leaves(placed):
        assert array.sharding.is_equivalent_to(replicated(make_mesh()), array.ndim)
    # What lies right is not copied.
    again = one.with_params(placed[0])._placed(make_mesh())
    for a, b in zip(jax.tree.leaves(placed[0]), jax.tree.leaves(again[0]), strict=True):
        assert [x.data.unsafe_buffer_pointer() for x in a.addressable_shards] == [
            x.data.unsafe_buffer_pointer() for x in b.addressable_shards
        ]


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_guidance_outside_its_interval_is_not_computed(sampler):
    """In the compiled program it is one side of a condition, whose other side is half the work."""

    def network(params, z, r, t, label, _):
        return jnp.tanh(z @ params) * (t + r)[:, None]

    stub = pipeline().network._replace(apply=network, null_label=3)
    codec = Autoencoder(None, None, jax.tree_util.Partial(lambda x: x))
    x = jax.ShapeDtypeStruct((6,), jnp.int32)
    inputs = jax.eval_shape(noise_of((8,)), 0, x)
    weights = jax.ShapeDtypeStruct((8, 8), jnp.float32)

    def program(guidance: float) -> str:
        run = make_sampler(stub, (8,))
        numbers = numbers_of(grid_of(4), guidance, (0.2, 0.7))
        options = (weights, codec, x, *inputs, numbers, sampler, guidance != 1, False)
        return run.lower(*options).compile().as_text()

    calls = {"euler": 1, "heun": 2}[sampler]
    plain, guided = program(1.0), program(2.0)
    assert plain.count(" conditional(") == 0 and guided.count(" conditional(") == calls
    found = re.findall(r"= f32\[(\d+),8\]\S* tanh\(.*?op_name=\"([^\"]*)", guided)
    widths = {(int(n), re.findall(r"branch_(\d)_fun", where)[-1]) for n, where in found}
    assert widths == {(6, "0"), (12, "1")}  # and none outside the two sides


def test_batches_from_the_devices_ask_the_host_for_numbers_alone():
    class Closed(ArraySource):
        """Items that can be read until they are closed."""

        closed = False

        def gather(self, indices, mirrored=None):
            assert not self.closed, "read from the host"
            return super().gather(indices, mirrored)

    source = Closed(np.arange(40, dtype=np.uint8).reshape(-1, 1, 1, 1), np.arange(40) % 10)
    batches = feed(source, make_mesh(), cache="device", batch_size=16, seed=0, flip=False)(0)
    next(batches)
    source.closed = True
    for _ in range(10):  # four epochs
        batch = next(batches)
        assert (batch["x"].ravel() % 10 == batch["label"].astype(np.uint8)).all()
