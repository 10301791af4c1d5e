"""Imported weights against the public repositories' own code, with random weights in their own
files: `make oracles` with PEERS=FOLDER, as tests/oracles/peers.py says; skipped without.
"""

import os
import pathlib
import subprocess
import sys

import flax
import jax
import numpy as np
import pytest
import torch

from pipelines.flow import FlowPipeline
from pipelines.imports import folder, read
from pipelines.imports.folder import Import
from tests import import_case as case
from tests.oracles import public_networks
from utils.cli import UserError

ROOT = pathlib.Path(__file__).parents[2]
# Their float32 frequencies differ from ours in the last digit; jax-flow multiplies them by 10,000.
WITHIN = {"jax_flow": 1e-3}
TINY = public_networks.TINY | {"hidden_size": 48}  # no width of DiT's: --num_heads is needed


@pytest.fixture(autouse=True)
def their_arithmetic():
    """Their code counts on ranks and types promoted as usual."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(params=[False, True], ids=["msgpack", "orbax"])
def orbax(request):
    """Both kinds of checkpoint that flax.training.checkpoints has written."""
    before = flax.config.flax_use_orbax_checkpointing
    flax.config.update("flax_use_orbax_checkpointing", request.param)
    yield request.param
    flax.config.update("flax_use_orbax_checkpointing", before)


def saved(form: str, public: public_networks.Public, path: pathlib.Path) -> pathlib.Path:
    """Their checkpoint; flax names its own within the folder."""
    public.save(path / "checkpoint.pt")
    return path if form == "meanflow" else path / "checkpoint.pt"


def by_command(form: str, file: pathlib.Path, out: pathlib.Path, *more: str) -> FlowPipeline:
    """The pipeline, after the command as a user types it."""
    command = [sys.executable, "import_weights.py", f"--format={form}", f"--checkpoint={file}"]
    done = subprocess.run(
        [*command, f"--out={out}", *more], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return FlowPipeline.from_pretrained(out)


def difference(form: str, pipeline: FlowPipeline, public: public_networks.Public, n: int) -> float:
    """The largest difference of u; a flipped sign, and times the other way, differ by far more."""
    side = pipeline.shape[0]
    z, r, labels = case.inputs(side, pipeline.num_classes, n)
    t = case.TIMES[:n] if form != "dit" else case.times_of(case.STEPS[:n]).astype(np.float32)
    r = r if pipeline.averages else t
    expected = public.velocity(z, r, t, labels)
    assert expected.shape == z.shape and 0.1 < expected.std() < 10
    assert abs(-pipeline.velocity(z, r, t, labels) - expected).max() > 1
    backwards = pipeline.velocity(z, 1 - t, 1 - t, labels)
    assert abs(backwards - expected).max() > 0.01
    return float(abs(pipeline.velocity(z, r, t, labels) - expected).max())


SIZES = [
    *(("dit", f"DiT-{size}/{patch}") for size in ("S", "B", "XL") for patch in (2, 4)),
    *(("sit", f"SiT-{size}") for size in ("S/4", "B/2", "XL/2")),
    *(("meanflow", f"DiT_{size}") for size in ("S_2", "B_4")),
    *(("meanflow_torch", f"SiT-{size}") for size in ("B/2", "B/4")),
]


@pytest.mark.parametrize(("form", "size"), SIZES)
def test_published_sizes_give_the_same_velocity(form, size, tmp_path):
    public = public_networks.BUILD[form](size, bare=True)
    pipeline = by_command(form, saved(form, public, tmp_path), tmp_path / "out")
    assert pipeline.shape == (32, 32, 4) and pipeline.num_classes == 1000
    assert pipeline.config.model.size == size[4:].replace("_", "/")
    found = difference(form, pipeline, public, n=2)
    print(f"{form} {size}: {found:.1e}")
    assert found < 1e-4


@pytest.mark.parametrize("form", [*public_networks.BUILD])
def test_checkpoints_of_their_training_give_the_average_alone(form, tmp_path, monkeypatch):
    """The file holds other parameters beside the average, an optimizer's state, and options."""
    if form == "jax_flow":
        pytest.importorskip("einops")
    public = public_networks.BUILD[form](**TINY)
    file = saved(form, public, tmp_path)
    more = ["--image_size=64"] if form == "meanflow" else []
    more += [] if form == "jax_flow" else ["--num_heads=4"]
    pipeline = by_command(form, file, tmp_path / "out", *more)
    found = difference(form, pipeline, public, n=4)
    print(f"{form}: {found:.1e}")
    assert found < WITHIN.get(form, 1e-4)
    options = Import(form, str(file), str(tmp_path / "raw"), "none", num_heads=4, image_size=64)
    assert ("(params)" if form == "meanflow" else "(model)") in folder.run(options)
    guidance = 2.5 if form == "meanflow_torch" else 1.0  # 0.2 / (1 − 0.92), in its options
    assert pipeline.card["trained_guidance"] == pytest.approx(guidance)
    raw = FlowPipeline.from_pretrained(tmp_path / "raw")
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), raw.params, pipeline.params)
    assert gap["patch"]["bias"] == pytest.approx(1, abs=1e-5)


def test_both_files_of_flax(orbax, tmp_path):
    public = public_networks.meanflow(**TINY)
    saved("meanflow", public, tmp_path)
    written = tmp_path / "checkpoint_1234"
    assert written.is_dir() == orbax
    for file in (written, tmp_path):
        out = tmp_path / f"out_{file.name}"
        folder.run(Import("meanflow", str(file), str(out), image_size=64, num_heads=4))
        assert difference("meanflow", FlowPipeline.from_pretrained(out), public, n=4) < 1e-4


def test_jax_flow_without_times(tmp_path):
    pytest.importorskip("einops")
    public = public_networks.jax_flow(**TINY, t_conditioning=0)
    file = saved("jax_flow", public, tmp_path)
    folder.run(Import("jax_flow", str(file), str(tmp_path / "out")))
    pipeline = FlowPipeline.from_pretrained(tmp_path / "out")
    z, _, labels = case.inputs(pipeline.shape[0], pipeline.num_classes)
    t = case.TIMES
    expected = public.velocity(z, t, t, labels)
    assert abs(pipeline.velocity(z, t, t, labels) - expected).max() < 1e-4


def test_options_of_another_training_are_refused(tmp_path):
    """SiT may have been trained on other paths, or on scores: the tensors look alike."""
    for changed in ({"path_type": "VP"}, {"prediction": "noise"}):
        public = public_networks.sit(**TINY, options=changed)
        file = saved("sit", public, tmp_path)
        ((name, value),) = changed.items()
        with pytest.raises(UserError, match=f"was trained with {name}={value}, and"):
            folder.run(Import("sit", str(file), str(tmp_path / "out"), num_heads=4))
    with pytest.raises(UserError, match="was trained with model=SiT-XL/2, and"):
        folder.run(Import("dit", str(file), str(tmp_path / "out"), num_heads=4))
    assert not (tmp_path / "out").exists()


def test_normed_queries_are_refused(tmp_path):
    public = public_networks.meanflow_torch(**TINY, qk_norm=True)
    file = saved("meanflow_torch", public, tmp_path)
    with pytest.raises(UserError, match=r"queries and keys are normed .*attn\.q_norm"):
        folder.run(Import("meanflow_torch", str(file), str(tmp_path / "out"), num_heads=4))
    assert not (tmp_path / "out").exists()


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "pickle"])
def test_a_file_of_torch_runs_nothing(zipped, tmp_path):
    content = {"ema": {"a": torch.ones(2)}, "b": Canary(tmp_path / "canary")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"holds more than tensors: it asks for posix\.mkdir"):
        folder.run(Import("sit", str(tmp_path / "a.pt"), str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_damaged_files_of_torch_are_refused(tmp_path):
    public = public_networks.sit(**TINY)
    public.save(tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for kept in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.pt").write_bytes(whole[:kept])
        with pytest.raises(UserError, match=r"a\.pt cannot be read|a\.pt is refused"):
            folder.run(Import("sit", str(tmp_path / "a.pt"), str(tmp_path / "out"), num_heads=4))
    assert not (tmp_path / "out").exists()


def laughs() -> dict:
    """2^50 tensors in a few hundred bytes: a dict that twice holds a dict that twice holds …"""
    value: dict = {"a": torch.ones(2)}
    for _ in range(50):
        value = {"a": value, "b": value}
    return value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"ema": {"a": torch.zeros(1).expand(1 << 35)}}, "says to hold 137,438,953,472 bytes"),
        ({"a": torch.zeros(1, dtype=torch.bfloat16).expand(1 << 35)}, "says to hold"),
        ({"a": torch.as_strided(torch.zeros(2), (1 << 18, 1 << 18), (0, 0))}, "says to hold"),
        ({"ema": {"a": torch.ones(2).to_sparse()}}, "a is no tensor of floating-point"),
        ({"ema": {"a": torch.ones(2, device="meta")}}, "a is no tensor of floating-point"),
        ({"ema": {"a": torch.ones(2, dtype=torch.complex64)}}, "a is no tensor of floating-point"),
        ({"ema": laughs()}, "it holds itself, or too much"),
        ({"ema": {1: torch.ones(2)}}, "no tensors by name"),
        ({("a", "b"): torch.ones(2)}, "no tensors by name"),
        ([torch.ones(2)], "no tensors by name"),
    ],
)
def test_wrong_tensors_of_torch_are_refused(content, words, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=words):
        folder.run(Import("sit", str(tmp_path / "a.pt"), str(tmp_path / "out"), num_heads=4))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_torch_are_read(kind, tmp_path):
    """Transposed ones among them, which lie in memory the other way."""
    value = torch.arange(6.0).reshape(2, 3)
    content = {"a": value.to(kind), "b": value.to(kind).T, "c": torch.nn.Parameter(value.to(kind))}
    torch.save({"ema": content}, tmp_path / "a.pt")
    found = read.read(tmp_path / "a.pt", "sit").tensors
    for name, given in (("a", value), ("b", value.T), ("c", value)):
        np.testing.assert_array_equal(found[name].astype(np.float32), given.numpy())
