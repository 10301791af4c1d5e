"""Averages: against loops, integrals and one another; snapshots, and what is made of them."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from ml_collections import ConfigDict

from configs import base, digits
from pipelines import objectives, runs
from pipelines.train import train
from utils import averages
from utils.cli import UserError
from utils.sharding import born_sharded, make_mesh
from utils.step import init_state, make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")


def ema_of(**changes) -> ConfigDict:
    ema = base.get_config().ema
    ema.update({"decay": 0.9, **changes})
    return ema


def walk(steps: int, seed: int = 0) -> np.ndarray:
    """Parameters (steps, 6) along a random walk that begins away from 0."""
    rng = np.random.default_rng(seed)
    return np.float32(np.cumsum(rng.standard_normal((steps, 6)), axis=0) / 10 + 3)


def follow(ema: ConfigDict, path: np.ndarray, skip: int = 0) -> tuple[dict, dict]:
    """The averages after each step of a path, (steps, 6) by name, and the last as a tree.

    Args:
      skip: updates that were left out before these.
    """

    def step(held, row):
        number, theta = row
        tree = {"layer": {"w": theta}}
        held = averages.update(ema, held, tree, number + skip, number + 1)
        return held, {name: tree["layer"]["w"] for name, tree in held.items()}

    start = averages.begin(ema, {"layer": {"w": jnp.zeros(path.shape[1])}})
    last, rows = jax.lax.scan(step, start, (jnp.arange(len(path)), jnp.asarray(path)))
    return {name: np.asarray(row) for name, row in rows.items()}, jax.device_get(last)


def test_several_decays_every_few_updates_against_a_loop():
    ema = ema_of(also=(0.99, 0.5), interval=3, start_step=10)
    path = walk(40)
    found, _ = follow(ema, path, skip=2)
    assert averages.names(ema) == ("0.9", "0.99", "0.5") and len(found) == 3
    for name, rows in found.items():
        average = np.zeros(6)
        for number, theta in enumerate(path.astype(np.float64)):
            if (number + 1) % 3 == 0:  # counted in updates
                decay = 0.0 if number + 2 < 10 else float(name)  # by step
                average = decay * average + (1 - decay) * theta
            np.testing.assert_allclose(rows[number], average, rtol=1e-5)


def test_one_average_of_every_step_is_as_ever():
    path = walk(30)
    found, _ = follow(ema_of(start_step=4), path)
    average = jnp.zeros(6)
    for number, theta in enumerate(path):
        decay = jnp.where(number < 4, 0.0, 0.9)
        average = jax.jit(lambda a, p, d: d * a + (1 - d) * p)(average, theta, decay)
        np.testing.assert_allclose(found["0.9"][number], average, rtol=1e-6)


@pytest.mark.parametrize("interval", [1, 4])
def test_a_power_average_is_the_integral_of_its_profile(interval):
    """∫ p(τ) θ(⌈τ⌉) dτ by quadrature, τ counted in updates of the average."""
    width, path = 0.1, walk(240)
    ema = ema_of(posthoc=(width,), interval=interval)
    found, _ = follow(ema, path)
    gamma = averages.exponent(width)
    for t in (1, 2, 7, 60):
        seen = path[interval - 1 :: interval][:t].astype(np.float64)
        fine = (np.arange(t * 2000) + 0.5) / 2000
        profile = (gamma + 1) * (fine / t) ** gamma / t
        expected = (profile[:, None] * np.repeat(seen, 2000, axis=0)).mean(0) * t
        np.testing.assert_allclose(found["power_0.1"][t * interval - 1], expected, rtol=2e-5)
    assert interval == 1 or (found["power_0.1"][4] == found["power_0.1"][6]).all()


def test_the_share_of_an_update_is_right_after_millions():
    for t in (1, 2, 1000, 10**7):
        exact = -np.expm1(8.0 * np.log1p(-1 / t)) if t > 1 else 1.0
        assert float(averages._share(7.0, jnp.int32(t))) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_the_exponent_gives_the_width(width, gamma):
    """The numbers are the paper's; the width is the deviation of τ / t under the profile."""
    found = averages.exponent(width)
    assert found == pytest.approx(gamma, abs=0.01)
    tau = (np.arange(100_000) + 0.5) / 100_000
    weight = (found + 1) * tau**found
    mean = (weight * tau).mean()
    assert np.sqrt((weight * (tau - mean) ** 2).mean()) == pytest.approx(width, rel=1e-4)


def test_products_of_profiles_against_quadrature():
    def profile(t, gamma):
        return np.where(tau <= t, (gamma + 1) * (tau / t) ** gamma / t, 0.0)

    tau = (np.arange(400_000) + 0.5) / 400_000 * 20
    for a, b in [((5.0, 7.0), (20.0, 17.0)), ((20.0, 17.0), (5.0, 7.0)), ((9.0, 3.0), (9.0, 3.0))]:
        exact = (profile(*a) * profile(*b)).mean() * 20
        found = averages.products(*(tuple(map(np.asarray, p)) for p in (a, b)))
        assert found == pytest.approx(exact, rel=1e-4)


def snapshots_of(folder: pathlib.Path, ema: ConfigDict, path: np.ndarray) -> dict:
    """Writes the snapshots of a run along a path; returns the last averages."""
    rows, last = follow(ema, path)
    for step in range(ema.snapshot_interval, len(path) + 1, ema.snapshot_interval):
        held = {name: {"layer": {"w": row[step - 1]}} for name, row in rows.items()}
        averages.save_snapshot(folder, ema, held, step, averages.counted(ema, step))
    return last


@pytest.mark.parametrize("target", [0.04, 0.07, 0.15])
def test_an_average_made_afterwards_is_the_one_that_is_tracked(target, tmp_path):
    """On a random walk, and to the same where the last step has no snapshot of its own."""
    path = walk(3230)
    ema = ema_of(posthoc=(0.05, 0.1), snapshot_interval=100)
    last = snapshots_of(tmp_path, ema, path)
    assert len(averages.snapshots(epath.Path(tmp_path))) == 32
    direct = follow(ema_of(posthoc=(target,)), path)[0][f"power_{target}"]
    for step in (3230, 3200):
        own = last
        if step == 3200:
            own = {n: {"layer": {"w": r[-1]}} for n, r in follow(ema, path[:step])[0].items()}
        own = {name: tree for name, tree in own.items() if name.startswith("power")}
        asked = f"posthoc_{target}"
        found = averages.reconstruct(epath.Path(tmp_path), ema, asked, step, step, own)
        wanted = direct[step - 1]
        error = np.linalg.norm(found["layer"]["w"] - wanted) / np.linalg.norm(wanted)
        assert error < 1e-3 and found["layer"]["w"].dtype == np.float32
        away = [np.linalg.norm(tree["layer"]["w"] - wanted) for tree in own.values()]
        assert min(away) > 3 * np.linalg.norm(found["layer"]["w"] - wanted)


def test_what_cannot_be_made_says_so(tmp_path):
    path, ema = walk(300), ema_of(posthoc=(0.1, 0.2), snapshot_interval=100)
    last = snapshots_of(tmp_path, ema, path)
    own = {name: tree for name, tree in last.items() if name.startswith("power")}
    place = epath.Path(tmp_path)
    options = {"workdir": place, "ema": ema, "step": 300, "updates": 300, "own": own}
    with pytest.raises(UserError, match=r"2 snapshots before it of widths .* leave an error"):
        averages.reconstruct(asked="posthoc_0.01", **options)
    same = averages.reconstruct(asked="posthoc_0.1", **options)
    np.testing.assert_allclose(same["layer"]["w"], own["power_0.1"]["layer"]["w"], rtol=1e-5)
    for asked in ("posthoc_", "posthoc_0.3", "posthoc_nan"):
        with pytest.raises(UserError, match=r"a width from 0.005 to 0.28"):
            averages.reconstruct(asked=asked, **options)
    file = place / averages.FOLDER / "000000200.safetensors"
    for damaged in (b"", file.read_bytes()[:-3], safetensors.numpy.save({"x": np.ones(3)})):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is no snapshot .*: move it away"):
            averages.reconstruct(asked="posthoc_0.15", **options)


COMBINATIONS = [((0.1, 0.2), (100, 200, 300)), ((0.05, 0.1), (1, 7, 30, 31)), ((0.05, 0.1), (40,))]


@pytest.mark.parametrize(("widths", "lengths"), COMBINATIONS, ids=str)
@pytest.mark.parametrize("target", [0.03, 0.12, 0.25])
def test_the_combination_is_the_nearest_of_those_that_sum_to_1(widths, lengths, target):
    """At the minimum the gradient of the distance is the same along every weight (Lagrange)."""
    lengths = np.repeat(np.float64(lengths), len(widths))
    gammas = np.resize([averages.exponent(width) for width in widths], len(lengths))
    wanted = lengths[-1], averages.exponent(target)
    weights, far = averages.solve(lengths, gammas, *wanted)
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    pairs = averages.products((lengths[:, None], gammas[:, None]), (lengths, gammas))
    right = averages.products((lengths, gammas), tuple(map(np.float64, wanted)))
    slope = pairs @ weights - right
    assert np.ptp(slope) < 1e-6 * np.abs(right).max()
    square = averages.products(*[tuple(map(np.float64, wanted))] * 2)
    rest = weights @ pairs @ weights - 2 * weights @ right + square
    assert far == pytest.approx(np.sqrt(rest / square), rel=1e-3)


def test_what_is_made_of_constant_parameters_is_they(tmp_path, monkeypatch):
    """However far the profile: nothing is shrunken."""
    monkeypatch.setattr(averages, "FARTHEST", 1.0)
    path, ema = np.full((40, 6), 3.0, np.float32), ema_of(posthoc=(0.05, 0.1), snapshot_interval=40)
    last = snapshots_of(tmp_path, ema, path)
    own = {name: tree for name, tree in last.items() if name.startswith("power")}
    for asked in ("posthoc_0.12", "posthoc_0.03"):
        found = averages.reconstruct(epath.Path(tmp_path), ema, asked, 40, 40, own)
        np.testing.assert_allclose(found["layer"]["w"], 3.0, rtol=1e-6)


def test_snapshots_without_weight_are_not_read(tmp_path):
    path, ema = walk(300), ema_of(posthoc=(0.1, 0.2), snapshot_interval=20)
    last = snapshots_of(tmp_path, ema, path)
    own = {name: tree for name, tree in last.items() if name.startswith("power")}
    options = epath.Path(tmp_path), ema, "posthoc_0.1", 300, 300, own
    whole = averages.reconstruct(*options)
    for file in (tmp_path / averages.FOLDER).iterdir():
        file.write_bytes(file.read_bytes()[:-1])  # the head is whole, the tensors are not
    np.testing.assert_array_equal(averages.reconstruct(*options)["layer"]["w"], whole["layer"]["w"])
    weights = np.array([1e-9, 0.6, -4e-7, 0.4, 5e-7, -7e-7])
    kept = averages._without_negligible(weights)
    assert kept.tolist() == [0.0, 0.6, 0.0, 0.4, 0.0, -7e-7]


@pytest.mark.parametrize("done", [0, 250])
def test_snapshots_of_another_run_do_not_stay_among_those_of_this(done, tmp_path, capsys):
    """At a start all go aside, where nothing is replaced; later those go that come again."""
    ema = ema_of(posthoc=(0.1,), snapshot_interval=100)
    for _ in range(2):
        snapshots_of(tmp_path, ema, walk(400))
        averages.make_way(tmp_path, done)
        left = averages.steps_before(epath.Path(tmp_path), 1000)
        assert left == ([100, 200] if done else [])
    aside = sorted(path.name for path in tmp_path.glob("*/*400.safetensors"))
    assert len(aside) == (0 if done else 2)
    said = capsys.readouterr().err
    assert said.count("\n") == len(aside) and (done or "moved to" in said)
    averages.make_way(tmp_path / "new", 0)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("steps", [1000, 100_000])
def test_much_room_is_told_before_it_is_taken(steps, capsys):
    config = base.get_config()
    config.max_steps = steps
    config.ema.update({"posthoc": (0.05, 0.1), "snapshot_interval": 100})
    held = {name: {"w": np.zeros(250_000)} for name in averages.names(config.ema)}
    averages.tell_size(config, held)
    told = "1,000 snapshots of averages will take 2.0 GB in all, one 0.00 GB"
    said = capsys.readouterr().err
    assert (told in said and said.count("\n") == 1) if steps > 1000 else not said
    config.ema.snapshot_interval = 0
    averages.tell_size(config, held)
    said = capsys.readouterr().err
    assert "add --ema.snapshot_interval=1000; --ema=power_0.05 is kept" in said


HOSTILE = ["0.1", ("nan,0.1",), ((0.1,),), (float("nan"),), (-0.1,), (True,), (0.1,) * 10**5, None]


@pytest.mark.parametrize("key", ["also", "posthoc"])
@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: str(value)[:12])
def test_lists_that_hold_something_else_are_told_in_a_line(key, value):
    config = base.get_config()
    with config.ignore_type():
        config.ema[key] = value
    given = "0.999,0.99999" if key == "also" else r"0\.05,0\.1"
    with pytest.raises(UserError, match=rf"numbers from .*: give --ema\.{key}={given}") as raised:
        averages.check(config)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon"])
def test_updates_left_out_change_no_average_and_no_t(name):
    """The closed form holds over the updates that were made."""
    config = base.get_config()
    config.update({"batch_size": 2})
    config.optimizer.update({"name": name, "lr": 0.1})
    config.ema.update({"decay": 0.5, "posthoc": (0.1,)})
    mesh = make_mesh(1, 1, jax.devices()[:1])

    def objective(network, params, batch, key):
        error = jnp.mean((batch["x"] - params["layer"]["kernel"].sum()) ** 2)
        return error, {"error": (error, jnp.ones(()))}

    def init(key):
        return {"layer": {"kernel": jnp.linspace(0.0, 1.0, 4096).reshape(64, 64) / 4096}}

    step = make_step(config, None, objective, lambda x, keys: x, mesh)
    state, seen = born_sharded(lambda: init_state(config, init), mesh), []
    for number in range(6):
        before = jax.device_get(state)
        x = jnp.full((2,), jnp.nan if number in (1, 4) else 1.0)
        place = jnp.arange(2, dtype=jnp.int32)
        state, metrics = step(state, {"x": x, "label": place, "position": place})
        assert bool(metrics["skipped"]) == (number in (1, 4))
        if number in (1, 4):
            kept = jax.device_get((state.ema, state.opt_state))
            jax.tree.map(np.testing.assert_array_equal, kept, (before.ema, before.opt_state))
        else:
            seen.append(np.asarray(state.params["layer"]["kernel"], np.float64))
    gamma = averages.exponent(0.1)
    edges = (np.arange(5) / 4) ** (gamma + 1)
    expected = np.tensordot(np.diff(edges), np.stack(seen), 1)
    found = state.ema["power_0.1"]["layer"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


# In runs.


def tiny_run(folder: pathlib.Path, steps: int) -> None:
    config = digits.get_config()
    config.model.update({"depth": 1, "hidden_size": 32, "num_heads": 2, "unroll": 1})
    config.update({"batch_size": 16, "max_steps": steps, "save_interval": 5, "log_interval": 5})
    config.update({"eval_interval": 1000, "keep_checkpoints": 3})
    config.optimizer.update({"lr": 0.01, "warmup_steps": 0, "name": "adamw8bit"})
    config.ema.update({"decay": 0.9, "also": (0.5,), "posthoc": (0.1, 0.2)})
    config.ema.update({"snapshot_interval": 2})
    config.sample.update({"steps": (1,), "num": 4})
    train(config, str(folder), objectives.flow_objective)


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """A run of ten steps, and the same killed beyond its save at five, and gone on with."""
    whole = tmp_path_factory.mktemp("whole")
    parts = tmp_path_factory.mktemp("killed") / "parts"
    with jax.numpy_dtype_promotion("standard"):
        tiny_run(whole, 10)
        shutil.copytree(whole, parts)
        shutil.rmtree(parts / "checkpoints" / "10")
        (parts / "averages" / "000000006.safetensors").write_bytes(b"of before the kill")
        for step in (8, 10):
            (parts / "averages" / f"{step:09d}.safetensors").unlink()
        tiny_run(parts, 10)
    return whole, parts


def test_snapshots_of_a_run_gone_on_with_are_those_of_one_that_was_not_stopped(workdirs):
    folders = [workdir / "averages" for workdir in workdirs]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] == [f"{step:09d}.safetensors" for step in (2, 4, 6, 8, 10)]
    for name in names[0]:
        one, other = ((folder / name).read_bytes() for folder in folders)
        assert one == other
    last = safetensors.numpy.load_file(folders[0] / names[0][-1])
    assert {name.partition("/")[0] for name in last} == {"power_0.1", "power_0.2"}
    assert {value.dtype for value in last.values()} == {np.dtype(np.float32)}


def flat(pipeline) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(pipeline.params)])


def test_every_average_of_a_run_can_be_asked_for(workdirs):
    run = runs.load_runs([str(workdirs[0])])[workdirs[0].name]
    words = ["", "0.9", "0.5", "power_0.1", "power_0.2", "none", "posthoc_0.15"]
    assert [run.average(word) for word in words] == ["0.9", *words[1:]]
    found = {word: flat(run.load(10, run.average(word))) for word in words}
    assert len({value.tobytes() for value in found.values()}) == len(words) - 1
    # It lies between those of the widths around it, and an own width is the own average.
    away = [np.linalg.norm(found["posthoc_0.15"] - found[f"power_{w}"]) for w in (0.1, 0.2)]
    assert max(away) < np.linalg.norm(found["power_0.1"] - found["power_0.2"])
    np.testing.assert_allclose(flat(run.load(10, "posthoc_0.2")), found["power_0.2"], atol=1e-5)
    np.testing.assert_allclose(
        flat(run.load(5, "posthoc_0.2")), flat(run.load(5, "power_0.2")), atol=1e-5
    )
    there = "there are 0.9, 0.5, power_0.1, power_0.2, none, posthoc_WIDTH"
    with pytest.raises(UserError, match=f"no average of decay 0.7: {there}"):
        run.average("0.7")
    with pytest.raises(UserError, match="a width from"):
        run.average("posthoc_1")


def test_numbers_of_an_average_are_of_its_snapshots(workdirs, tmp_path):
    """The identity that they are kept under is another where a snapshot is gone, or new."""
    folder = tmp_path / "copy"
    shutil.copytree(workdirs[0], folder)

    def identities() -> list[str]:
        run = runs.load_runs([str(folder)])["copy"]
        return [run.identity(10, ema) for ema in ("posthoc_0.15", "power_0.1", "")]

    before = identities()
    assert before[0] != before[1] == before[2]
    (folder / "averages" / "000000010.safetensors").unlink()  # the checkpoint's own step
    assert identities() == before
    (folder / "averages" / "000000004.safetensors").rename(folder / "away.safetensors")
    assert identities()[0] != before[0] and identities()[1:] == before[1:]
    (folder / "away.safetensors").rename(folder / "averages" / "000000004.safetensors")
    assert identities() == before


def test_a_run_anew_in_the_folder_leaves_none_of_the_old_snapshots(workdirs, tmp_path):
    folder = tmp_path / "anew"
    shutil.copytree(workdirs[0], folder)
    shutil.rmtree(folder / "checkpoints")
    tiny_run(folder, 3)
    assert [path.name for path in (folder / "averages").iterdir()] == ["000000002.safetensors"]
    assert len(list((folder / averages.ASIDE).iterdir())) == 5


def test_a_run_without_snapshots_names_the_options(workdirs, tmp_path):
    for name in ("config.json", "card.json"):
        value = json.loads((workdirs[0] / name).read_text())
        if name == "config.json":
            value["ema"].update({"posthoc": [], "snapshot_interval": 0})
        (tmp_path / name).write_text(json.dumps(value))
    run = runs.load_runs([str(tmp_path)])[tmp_path.name]
    with pytest.raises(UserError, match=r"train with --ema\.posthoc=0\.05,0\.1"):
        run.average("posthoc_0.1")
