"""Other people's weights: stored cases of their own code, their files, wrong ones and hostile ones.

tests/oracles/test_imports.py compares with the code itself; `tests.oracles.write_imports` stored
what it gave for these weights, which are from a seed.
"""

import functools
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import serialization
from flax.core import FrozenDict
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from models.layers import sinusoids
from pipelines import export
from pipelines.flow import FlowPipeline
from pipelines.imports import convert, folder, pickles, read
from pipelines.imports.folder import Import
from pipelines.imports.formats import FORMATS
from tests import import_case as case
from tests import small
from utils.cli import UserError

ROOT = pathlib.Path(__file__).parents[1]
HEADS = case.TINY["num_heads"]


@functools.cache
def stored() -> dict[str, np.ndarray]:
    with np.load(ROOT / "tests" / "data" / "imports.npz") as arrays:
        return dict(arrays)


@functools.cache
def tensors(form: str) -> dict[str, np.ndarray]:
    """The case's weights under the names, and in the shapes, that their code gave them."""
    names, shapes = stored()[f"{form}/names"], stored()[f"{form}/shapes"]
    sizes = {str(k): tuple(map(int, s.split(","))) for k, s in zip(names, shapes, strict=True)}
    return case.weights(sizes, case.TINY["hidden_size"])


def raw(form: str) -> dict[str, np.ndarray]:
    """Other weights, as a checkpoint has them beside its average."""
    return {k: v if k == "pos_embed" else v + 1 for k, v in tensors(form).items()}


def write(form: str, path: pathlib.Path, change=None) -> pathlib.Path:
    """A checkpoint as their training writes it; PyTorch's as safetensors, which need no torch."""
    average, other = dict(tensors(form)), raw(form)
    average = change(average) or average if change else average
    if form == "meanflow":
        trees = {"params": other, "ema_params": average}
        nested = {key: {"net": unflatten_dict(tree, sep=".")} for key, tree in trees.items()}
        state = {"step": 7, "opt_state": {"0": {"mu": nested["params"]}}, **nested}
        path.write_bytes(serialization.msgpack_serialize(state))
    elif form == "jax_flow":
        path.write_bytes(pickle.dumps(jax_flow_state(average, other)))
    else:
        trees = {"ema": average, "model": other}
        flat = {
            f"{key}.module.{name}": v for key, tree in trees.items() for name, v in tree.items()
        }
        path.write_bytes(safetensors.numpy.save(flat))
    return path


def jax_flow_state(average: dict, other: dict) -> dict:
    """What its Checkpoint pickles: arrays of jax, states of optax, a config, and the time."""
    average, other = (
        jax.tree.map(jnp.asarray, unflatten_dict(tree, sep=".")) for tree in (average, other)
    )
    step = jnp.ones((), jnp.int32)
    moments = optax.ScaleByAdamState(count=step, mu=other, nu=np.asfortranarray(np.ones((2, 3))))
    adam = (moments, optax.EmptyState())
    return {
        "model": {"params": FrozenDict(other), "opt_state": adam, "step": step},
        "model_eps": {"params": FrozenDict(average), "opt_state": None, "step": 1},
        "config": ConfigDict({"hidden_size": 32, "t_conditioning": 1, "preset": "debug"}),
        "_timestamp": 1.5e9,
    }


def suffix(form: str) -> str:
    return {"meanflow": "", "jax_flow": ".pkl"}.get(form, ".safetensors")


def options(form: str, file: pathlib.Path, out: pathlib.Path) -> Import:
    size = 8 * case.SIDE if form == "meanflow" else 0
    return Import(form, str(file), str(out), num_heads=HEADS, image_size=size)


@pytest.fixture(scope="module", params=list(FORMATS))
def imported(request, tmp_path_factory) -> tuple[str, pathlib.Path, FlowPipeline]:
    """A format, the folder that its import wrote, and the pipeline that opens it."""
    form, place = request.param, tmp_path_factory.mktemp("imported")
    file = write(form, place / f"checkpoint{suffix(form)}")
    told = folder.run(options(form, file, place / "out"))
    assert FORMATS[form].origin in told and ("(ema" in told or "(model_eps)" in told)
    assert ("4 channels of the last layer" in told) == (form in ("dit", "sit"))
    return form, place / "out", FlowPipeline.from_pretrained(place / "out")


def questions(pipeline: FlowPipeline):
    """z, r, t, labels of the stored cases."""
    z, r, labels = case.inputs(case.SIDE, case.CLASSES, n=2)
    t = case.times_of(case.STEPS[:2]).astype(np.float32)
    t = t if pipeline.config.model.prediction == "noise" else case.TIMES[:2]
    return z, r if pipeline.averages else t, t, labels


# Their numbers


def test_the_velocity_is_what_their_code_gave(imported):
    form, _, pipeline = imported
    z, r, t, labels = questions(pipeline)
    expected = stored()[f"{form}/u"]
    assert expected.std() > 0.1
    # jax-flow's times are multiplied by 10,000, and the last digit of its frequencies with them.
    within = 1e-3 if form == "jax_flow" else 1e-4
    assert abs(pipeline.velocity(z, r, t, labels) - expected).max() < within
    # What could be wrong is not within it: the sign, the times' direction, the label.
    assert abs(-pipeline.velocity(z, r, t, labels) - expected).max() > 1
    assert abs(pipeline.velocity(z, 1 - t, 1 - t, labels) - expected).max() > 100 * within
    assert abs(pipeline.velocity(z, r, t, labels[::-1]) - expected).max() > 100 * within


def test_intervals_are_for_networks_that_average(imported):
    form, _, pipeline = imported
    z, _, t, labels = questions(pipeline)
    if form in ("meanflow", "meanflow_torch"):
        assert pipeline.config.objective == "mean_flow"
        gap = pipeline.velocity(z, t / 2, t, labels) - pipeline.velocity(z, t, t, labels)
        assert abs(gap).max() > 0.01
    else:
        with pytest.raises(UserError, match="give r = t"):
            pipeline.velocity(z, t / 2, t, labels)


def test_without_labels_the_null_label_is_meant(imported):
    _, _, pipeline = imported
    z, r, t, _ = questions(pipeline)
    null = np.full(2, case.CLASSES)
    np.testing.assert_array_equal(pipeline.velocity(z, r, t), pipeline.velocity(z, r, t, null))


def test_the_folder_says_where_it_comes_from(imported):
    form, path, pipeline = imported
    card = json.loads((path / "card.json").read_text())
    assert card["origin"] == FORMATS[form].origin and card["licence"] == FORMATS[form].licence
    assert card["shape"] == [case.SIDE, case.SIDE, 4] and card["num_classes"] == case.CLASSES
    assert card["parameters"] == sum(a.size for a in jax.tree.leaves(pipeline.params))
    config = json.loads((path / "config.json").read_text())
    assert config["autoencoder"] == FORMATS[form].autoencoder and config["use_stable_vae"] == 1
    assert card["origin"] in (path / "README.md").read_text()


def test_what_is_saved_again_is_the_same(imported, tmp_path):
    """Import → save → load: every byte of the weights, and u."""
    _, path, pipeline = imported
    pipeline.save_pretrained(tmp_path / "again")
    weights = [(place / "model.safetensors").read_bytes() for place in (path, tmp_path / "again")]
    assert weights[0] == weights[1]
    again, asked = FlowPipeline.from_pretrained(tmp_path / "again"), questions(pipeline)
    np.testing.assert_array_equal(again.velocity(*asked), pipeline.velocity(*asked))


def test_samples_are_drawn(imported):
    _, _, pipeline = imported
    drawn = pipeline.draw(np.arange(2), steps=2, decode=False)
    assert np.isfinite(drawn.samples).all()


def test_the_other_tree_is_there_for_the_asking(imported, tmp_path):
    form, _, pipeline = imported
    file = write(form, tmp_path / f"checkpoint{suffix(form)}")
    folder.run(options(form, file, tmp_path / "out")._replace(ema="none"))
    other = FlowPipeline.from_pretrained(tmp_path / "out").params["patch"]["bias"]
    np.testing.assert_allclose(other - pipeline.params["patch"]["bias"], 1, atol=1e-5)
    with pytest.raises(UserError, match=r"no tree for --ema=0\.99: it holds "):
        folder.run(options(form, file, tmp_path / "no")._replace(ema="0.99"))


@pytest.mark.parametrize("age", ["of today", "of 2024"])
def test_folders_of_orbax(age, tmp_path):
    """The same parameters as from the msgpack file; in 2024 the folder held such a file."""
    file, place = write("meanflow", tmp_path / "file"), tmp_path / "checkpoint_7"
    folder.run(options("meanflow", file, tmp_path / "from_file"))
    if age == "of today":
        state = serialization.msgpack_restore(file.read_bytes())
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(place, jax.tree.map(np.asarray, state))
    else:
        place.mkdir()
        file.rename(place / "checkpoint")
    folder.run(options("meanflow", tmp_path, tmp_path / "from_folder"))
    weights = [
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("from_file", "from_folder")
    ]
    assert weights[0] == weights[1]


def test_an_exported_pipeline_comes_back(tmp_path):
    pipeline = FlowPipeline.from_pretrained(ROOT / "pretrained" / "digits_mean_flow")
    export.write_diffusers(pipeline, tmp_path / "diffusers")
    told = folder.run(Import("diffusers", str(tmp_path / "diffusers"), str(tmp_path / "out")))
    assert "mean_flow" in told
    again = FlowPipeline.from_pretrained(tmp_path / "out")
    z = pipeline.noise(0, np.arange(3))
    asked = z, np.float32(0.2), np.float32(0.9), np.arange(3)
    np.testing.assert_array_equal(again.velocity(*asked), pipeline.velocity(*asked))


# What is done to the tensors


@pytest.mark.parametrize("scale", [1.0, 10_000.0])
def test_times_the_other_way_are_a_linear_map(scale):
    """K' · e(t) = K · e(1 − t) for every t, and done twice it undoes itself."""
    rng = np.random.default_rng(0)
    names = {
        "condition.time_t.in.kernel": (256, 8),
        "head.out.kernel": (8, 4),
        "head.out.bias": (4,),
    }
    given = {name: rng.standard_normal(shape) for name, shape in names.items()}
    turned = convert.reversed_time(given, scale)
    # In halves and quarters, which float32 has exactly.
    t = np.array([0, 0.25, 0.5, 1], np.float32)
    there, back = (
        np.asarray(sinusoids(jnp.asarray(scale * time)), np.float64) for time in (t, 1 - t)
    )
    name = "condition.time_t.in.kernel"
    gap = there @ turned[name] - back @ given[name]
    assert abs(gap).max() < 1e-5 * scale**0.75  # float32's angles, of up to `scale` radians
    assert abs(there @ given[name] - back @ given[name]).max() > 1
    again = convert.reversed_time(turned, scale)
    for name, value in given.items():
        np.testing.assert_allclose(again[name], value, atol=1e-12)


def test_formats_are_told_apart_by_their_names():
    for form in FORMATS:
        found = convert.likely(tensors(form))
        assert set(found[:2]) == {"dit", "sit"} if form in ("dit", "sit") else found[0] == form
    assert convert.likely({"a.weight": np.zeros(1)}) == []


# Wrong files: one line, and nothing written


def refused(form: str, file: pathlib.Path, **changes) -> str:
    """The one line that says why."""
    out = file.parent / "refused"
    with pytest.raises(UserError) as error:
        folder.run(options(form, file, out)._replace(**changes))
    assert not out.exists() and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("given", "named", "words"),
    [
        ("sit", "meanflow_torch", "missing (first r_embedder.mlp.0.weight)"),
        ("meanflow_torch", "sit", "4 unknown (first r_embedder"),
        ("meanflow_torch", "dit", "those of --format=meanflow_torch"),
        ("sit", "meanflow", "those of --format="),
        ("sit", "jax_flow", "no whole pickle"),
    ],
)
def test_another_format_is_named(given, named, words, tmp_path):
    file = write(given, tmp_path / f"a{'.bin' if named == 'jax_flow' else suffix(given)}")
    told = refused(named, file)
    assert words in told
    if named != "jax_flow":
        assert f"--format={given}" in told or f"or {given}" in told


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def with_value(name, value):
    return lambda tensors: tensors | {name: np.asarray(value, np.float32)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("blocks.1.mlp.fc2.bias"), "1 of 36 tensors missing (first blocks.1.mlp.fc2.bias)"),
        (without("x_embedder.proj.weight"), "it has no x_embedder.proj.weight"),
        (with_value("extra.weight", [1]), "1 unknown (first extra.weight)"),
        (with_value("blocks.0.attn.q_norm.weight", [1]), "queries and keys are normed"),
        (with_value("x_embedder.proj.bias", [1]), "x_embedder.proj.bias (1,) instead of (32,)"),
        (with_value("x_embedder.proj.bias", [np.nan] * 32), "numbers that are not finite"),
        (with_value("pos_embed", np.zeros((1, 16, 32))), "not the fixed sines and cosines"),
        (with_value("pos_embed", np.zeros((1, 15, 32))), "15 places, which make no square"),
        (with_value("y_embedder.embedding_table.weight", np.ones((1, 32))), "no labels beside"),
        (with_value("x_embedder.proj.weight", np.ones((32, 4, 2, 3))), "patches are not square"),
        (with_value("x_embedder.proj.weight", np.ones((30, 4, 2, 2))), "no multiple of 4"),
    ],
)
def test_a_tensor_that_is_wrong_is_named(change, words, tmp_path):
    file = write("meanflow_torch", tmp_path / "a.safetensors", change)
    assert words in refused("meanflow_torch", file)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_halves_are_read(kind, tmp_path):
    """Files of half the size hold the table of positions rounded, too."""
    half = jnp.dtype(kind)
    file = write(
        "sit", tmp_path / "a.safetensors", lambda t: {k: v.astype(half) for k, v in t.items()}
    )
    folder.run(options("sit", file, tmp_path / "out"))
    params = FlowPipeline.from_pretrained(tmp_path / "out").params
    expected = tensors("sit")["x_embedder.proj.bias"].astype(half).astype(np.float32)
    np.testing.assert_array_equal(params["patch"]["bias"], expected)


def test_a_format_is_not_proposed_where_names_are_right(tmp_path):
    """SiT's names are DiT's: other positions do not make it one."""
    change = with_value("pos_embed", np.zeros((1, 16, 32)))
    for form in ("sit", "dit"):
        told = refused(form, write(form, tmp_path / f"{form}.safetensors", change))
        assert "not the fixed sines" in told and "--format" not in told


def test_projectors_of_training_are_left_out(tmp_path):
    change = with_value("projectors.0.weight", np.ones((3, 3)))
    file = write("meanflow_torch", tmp_path / "a.safetensors", change)
    told = folder.run(options("meanflow_torch", file, tmp_path / "out"))
    assert "left out: projectors.0.weight" in told


def test_names_of_a_file_do_not_order_the_terminal(tmp_path):
    """Names of tensors and trees are a stranger's words: ESC ] 0 ; … would name the window."""
    order = "\x1b]0;mine\x07\x1b[2K\u202e\nerror"
    change = with_value(f"projectors.{order}", np.ones((3, 3)))
    file = write("meanflow_torch", tmp_path / "a.safetensors", change)
    told = folder.run(options("meanflow_torch", file, tmp_path / "out"))
    assert "left out: projectors.?]0;mine" in told and len(told.splitlines()) == 3
    assert all(line.isprintable() for line in told.splitlines())


def of_sizes(**changes) -> Callable:
    """A change of `write`: SiT's network of these sizes, which nobody's code gave."""
    s = convert.Sizes(1, 28, 2, 4, 8, 61, case.CLASSES, None, 4)._replace(**changes)
    shapes = convert.expected(FORMATS["sit"], s)
    return lambda _: case.weights(shapes, s.hidden_size)


def test_every_width_of_an_mlp_comes_through(tmp_path):
    """61 / 28 times 28 is 60.99…96, which is a layer of 61 units."""
    file = write("sit", tmp_path / "a.safetensors", of_sizes())
    folder.run(options("sit", file, tmp_path / "out"))
    params = FlowPipeline.from_pretrained(tmp_path / "out").params
    assert params["blocks"]["mlp"]["in"]["bias"].shape == (1, 61)


def test_a_folder_that_would_not_open_is_not_written(tmp_path, monkeypatch):
    file, describe = write("sit", tmp_path / "a.safetensors"), folder.described

    def wrongly(*given):
        config = describe(*given)
        config.model.mlp_ratio = 3.0
        return config

    monkeypatch.setattr(folder, "described", wrongly)
    told = refused("sit", file)
    assert "mlp.in.bias (2, 128) instead of (2, 96)" in told


def test_sizes_that_tensors_do_not_show_are_asked_for(tmp_path):
    file = write("sit", tmp_path / "a.safetensors")
    assert "width 32 are none of DiT's: give --num_heads" in refused("sit", file, num_heads=0)
    assert "does not divide the width" in refused("sit", file, num_heads=5)
    assert "positions is for 64" in refused("sit", file, image_size=128)
    file = write("jax_flow", tmp_path / "a.pkl")
    assert "its tensors have 4" in refused("jax_flow", file, num_heads=8)
    file = write("meanflow", tmp_path / "a")
    assert "give a multiple of 16" in refused("meanflow", file, image_size=60)


@pytest.mark.parametrize("form", list(FORMATS))
def test_damaged_files_are_refused(form, tmp_path):
    file = write(form, tmp_path / f"a{suffix(form)}")
    whole = file.read_bytes()
    for kept in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:kept])
        assert str(file) in refused(form, file)
    assert "no such file" in refused(form, tmp_path / "none")


def test_an_autoencoder_that_is_none_is_refused(tmp_path):
    file = write("sit", tmp_path / "a.safetensors")
    told = refused("sit", file, autoencoder=str(tmp_path / "none"))
    assert "no folder" in told and "none" in told
    wide = small.write_autoencoder(tmp_path / "wide", channels=8)
    told = refused("sit", file, autoencoder=str(wide))
    assert "does not decode latents of (8, 8, 4)" in told
    fitting = small.write_autoencoder(tmp_path / "fitting")
    out = tmp_path / "out"
    folder.run(options("sit", file, out)._replace(autoencoder=str(fitting)))
    assert (out / "autoencoder" / "config.json").exists()


def test_a_network_without_a_null_label_is_refused(tmp_path):
    state = jax_flow_state(dict(tensors("jax_flow")), raw("jax_flow"))
    state["config"].num_classes = case.CLASSES + 1  # as many as the table has rows
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(state))
    assert "without a null label" in refused("jax_flow", tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("rows", "told", "doubtful"),
    [(1000, None, True), (1000, 999, False), (1001, None, False)],
)
def test_a_table_of_a_thousand_rows_is_told(rows, told, doubtful, tmp_path, monkeypatch):
    """It may be ImageNet's without a null label, which most files do not say."""
    file = write("sit", tmp_path / "a.safetensors", of_sizes(num_classes=rows - 1))
    tree = read.read(file, "sit")._replace(config={} if told is None else {"num_classes": told})
    monkeypatch.setattr(read, "read", lambda *_: tree)
    done = folder.run(options("sit", file, tmp_path / "out"))
    assert ("without a null label" in done) == doubtful


@pytest.mark.parametrize("held", ["model.safetensors", "config.json", "checkpoints"])
def test_a_folder_that_holds_something_is_left_alone(held, tmp_path):
    """A run's folder, whose config would be replaced, as much as one of weights."""
    out = tmp_path / "out"
    out.mkdir()
    (out / held).write_bytes(b"mine")
    with pytest.raises(UserError, match="holds files already: name a new folder"):
        folder.run(options("sit", tmp_path / "not even looked for", out))
    assert [p.name for p in out.iterdir()] == [held] and (out / held).read_bytes() == b"mine"
    with pytest.raises(UserError, match="holds files already: name a new folder"):
        folder.run(options("sit", tmp_path / "not even looked for", out / held))


def test_an_empty_folder_is_written_into(tmp_path):
    file = write("sit", tmp_path / "a.safetensors")
    (tmp_path / "out").mkdir()
    folder.run(options("sit", file, tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_pytorch_is_asked_for_where_a_file_needs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pt").write_bytes(b"PK")
    assert "pip install torch" in refused("sit", tmp_path / "a.pt")


def test_the_command(tmp_path):
    file = write("sit", tmp_path / "a.safetensors")
    given = {"format": "sit", "checkpoint": file, "out": tmp_path / "out", "num_heads": 4}
    done = subprocess.run(
        [sys.executable, "import_weights.py", *(f"--{k}={v}" for k, v in given.items())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "left out: 4 channels of the last layer" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()


# Hostile pickles


class Calls:
    """Pickled, it asks for a call of `function`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def word(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def program(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls MODULE.NAME(argument), whatever pickle itself would write."""
    return b"\x80\x04" + word(module) + word(name) + b"\x93" + word(argument) + b"\x85R."


def array_state(data: bytes, shape: tuple[int, ...], dtype: str = "f4"):
    """An array as numpy pickles it, with a state of our own."""

    class State:
        def __reduce__(self):
            make, args, _ = np.zeros(1, np.float32).__reduce__()
            return make, args, (1, shape, Calls(np.dtype, dtype), False, data)

    return State()


FILE = "canary"
HOSTILE = {
    "os.system": pickle.dumps(Calls(os.system, f"touch {FILE}")),
    "posix.mkdir": pickle.dumps(Calls(os.mkdir, FILE)),
    "builtins.eval": pickle.dumps(Calls(eval, f"open('{FILE}', 'w')")),
    "builtins.open": program("builtins", "open", FILE),
    "builtins.getattr": pickle.dumps(Calls(getattr, Calls(np.zeros, 3), "tofile")),
    "functools.partial": pickle.dumps(functools.partial(os.mkdir, FILE)),
    "copy_reg._reconstructor": pickle.dumps(ConfigDict({}), protocol=0),
    "numpy.load": pickle.dumps(Calls(np.load, FILE)),
    "numpy.fromfile": pickle.dumps(Calls(np.fromfile, FILE)),
    "numpy.memmap": program("numpy", "memmap", FILE),
    "numpy.core.multiarray.fromfile": program("numpy.core.multiarray", "fromfile", FILE),
    "numpy.ndarray.tofile": program("numpy", "ndarray.tofile", FILE),
    "jax._src.array.np": program("jax._src.array", "np", FILE),
    "nested": pickle.dumps({"model_eps": {"params": {"a": (1, [Calls(os.mkdir, FILE)])}}}),
    "in a config": pickle.dumps(ConfigDict({"a": Calls(os.mkdir, FILE)})),
    "in an array's state": pickle.dumps(array_state(Calls(os.mkdir, FILE), (1,))),
    "array of objects": pickle.dumps(np.array([Calls(os.mkdir, FILE)], dtype=object)),
    "by another function": pickle.dumps({"a": jnp.ones(2)}).replace(
        b"\x8c\x0c_reconstruct\x94", b"\x8c\x0cfromfile_xyz\x94"
    ),
    "by number": b"\x80\x04\x82\x01.",  # of copyreg's extensions
    "outside": b"\x80\x04\x8c\x01aQ.",  # a persistent identifier
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_pickle_runs_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(HOSTILE[name])
    told = refused("jax_flow", tmp_path / "a.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pkl"]
    named = "." in name and name.replace("builtins.", "").replace("os.", "")
    assert not named or named in told


def laughs() -> bytes:
    """2^50 strings in 300 bytes: a list that twice holds a list that twice holds …"""
    value = ["ha"]
    for _ in range(50):
        value = [value, value]
    return pickle.dumps(value)


def held_by_itself() -> bytes:
    value: dict = {}
    value["a"] = value
    return pickle.dumps(value)


# 2^60 in 350 bytes: a tuple that twice holds a tuple that twice holds …
TUPLES = b"N" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(60))
FROZEN = word("flax.core.frozen_dict") + word("FrozenDict") + b"\x93"


@pytest.mark.parametrize(
    "program",
    {
        "SETITEM": b"}" + TUPLES + b"Ns.",
        "SETITEMS": b"}(" + word("a") + b"N" + TUPLES + b"Nu.",
        "DICT": b"(" + TUPLES + b"Nd.",
        "FROZENSET": b"(" + TUPLES + b"\x91.",
        "ADDITEMS": b"\x8f(" + TUPLES + b"\x90.",
        "passed on": b"}" + FROZEN + TUPLES + b"\x85RNs.",
        "a type's name": word("numpy") + word("dtype") + b"\x93" + TUPLES + b"\x85R.",
    }.values(),
)
def test_keys_that_take_for_ever_to_hash_are_refused(program, tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04" + program)
    assert "pickle of more than arrays" in refused("jax_flow", tmp_path / "a.pkl")


@pytest.mark.parametrize("name", pickles.STAND_INS)
def test_a_pickle_changes_nothing_of_what_reads_it(name, tmp_path):
    """BUILD sets attributes: a function's defaults would be other ones for the whole process."""
    state = b"N}" + word("__defaults__") + word("mine") + b"\x85s\x86"
    program = word(name[0]) + word(name[1]) + b"\x93" + state + b"b."
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04" + program)
    defaults = getattr(pickles.STAND_INS[name], "__defaults__", None)
    assert "a change of what reads it" in refused("jax_flow", tmp_path / "a.pkl")
    assert getattr(pickles.STAND_INS[name], "__defaults__", None) == defaults


@pytest.mark.parametrize(
    "content",
    [
        laughs(),
        held_by_itself(),
        pickle.dumps(array_state(b"1234", (1000, 1000))),
        pickle.dumps(array_state(b"1234", (-1,))),
        pickle.dumps(array_state(b"1234", (1,), ">f4")),
        b"\x80\x04Nr" + struct.pack("<I", 2**32 - 1) + b".",  # a slot of memory: 64 GB of them
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",  # a terabyte of bytes, it says
        b"\x80\x04" + b"(" * 1000 + b".",
    ],
)
def test_a_pickle_that_lies_about_sizes_is_refused(content, tmp_path):
    (tmp_path / "a.pkl").write_bytes(content)
    refused("jax_flow", tmp_path / "a.pkl")


def test_arrays_of_the_same_bytes_are_not_copied(tmp_path):
    """500 arrays of a megabyte in a file of one: computed with, they would fill the memory."""
    data = bytes(2**20)
    arrays = {f"a{i}": array_state(data, (2**19,), "f2") for i in range(500)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model_eps": {"params": arrays}}))
    tracemalloc.start()
    told = refused("jax_flow", tmp_path / "a.pkl")
    assert "says to hold 524,288,000 bytes" in told
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_folder_of_orbax_is_measured_before_it_is_read(tmp_path, monkeypatch):
    with ocp.PyTreeCheckpointer() as checkpointer:
        zeros = {"ema_params": {"a": np.zeros(2**21, np.float32)}}  # compressed to next to nothing
        checkpointer.save(tmp_path / "checkpoint_7", zeros)
    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", None)
    told = refused("meanflow", tmp_path / "checkpoint_7")
    assert "says to hold 8,388,608 bytes" in told


# flax's form of an array, of a type that is no number.
VOID = msgpack.ExtType(1, msgpack.packb(((2,), "V4", bytes(8))))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({1: np.ones(2, "f4")}, "is no meanflow network"),
        ({"ema_params": {1: np.ones(2, "f4")}}, "no tensors by name"),
        ({"ema_params": {"net": {1: np.ones(2, "f4")}}}, "no tensors by name"),
        ({"ema_params": {"a": VOID}}, "a is no tensor of floating-point"),
        ({"ema_params": {"a": np.zeros(2, "i4")}}, "a is no tensor of floating-point"),
        ({"ema_params": {"a": {"b": 1.5}}}, "a.b is no tensor of floating-point"),
        (
            {"ema_params": {"a.b": np.ones(2), "a": {"b": np.ones(2)}}},
            "two tensors of the name a.b",
        ),
    ],
)
def test_what_is_no_tensor_by_name_is_told(state, words, tmp_path):
    (tmp_path / "a").write_bytes(serialization.msgpack_serialize(state))
    assert words in refused("meanflow", tmp_path / "a")


def test_an_array_among_the_options_is_passed_over(tmp_path):
    state = jax_flow_state(dict(tensors("jax_flow")), raw("jax_flow"))
    state["config"] = ConfigDict({"t_conditioning": np.zeros(3)})
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(state))
    folder.run(options("jax_flow", tmp_path / "a.pkl", tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_is_read_of_a_pickle_is_what_was_written(tmp_path):
    """Every type of array, both orders of axes, both protocols of arrays, and scalars."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 3)).astype(kind) for kind in ("f2", "f4", "f8")]
    arrays += [np.asfortranarray(arrays[1]), np.arange(3), np.array(True), np.zeros((0, 2), "f4")]
    arrays += [np.asarray(jnp.ones(2, jnp.bfloat16)), np.float32(3)]
    for protocol in (2, 4, 5):
        written = {"a": [jnp.asarray(arrays[1]), *arrays], "b": {"c": (1, 2.5, None, "x", True)}}
        if protocol == 2:  # there bytes are words, decoded by a function
            written["a"] = []
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(written, protocol))
        found = pickles.load(tmp_path / "a.pkl")
        assert found["b"] == {"c": [1, 2.5, None, "x", True]}
        for one, other in zip(found["a"], written["a"], strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def test_trees_that_are_not_asked_for_are_not_built(tmp_path, monkeypatch):
    """Of a msgpack file Adam's state, twice the network, is passed over."""
    file, built = write("meanflow", tmp_path / "a"), []
    restore = serialization.msgpack_restore
    monkeypatch.setattr(
        serialization, "msgpack_restore", lambda b: built.append(len(b)) or restore(b)
    )
    read.read(file, "meanflow")
    assert sum(built) < file.stat().st_size / 2.5
