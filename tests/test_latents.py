"""Training and sampling on latents, from pictures to a table, with a small autoencoder."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from pipelines import groups, objectives, prepare, runs
from pipelines.flow import FlowPipeline
from pipelines.plan import Plan
from pipelines.pretrained import load_autoencoder
from pipelines.train import train
from tests.conftest import thorough
from tests.small import write_autoencoder, write_pictures
from utils import data, feed, shards
from utils.cli import UserError

pytestmark = pytest.mark.usefixtures("standard_promotion")
COUNT, SIDE = 48, 16
OBJECTIVES = {
    "flow_matching": objectives.flow_objective,
    "mean_flow": objectives.mean_flow_objective,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures, the autoencoders kl and other, and what was prepared of them."""
    root = tmp_path_factory.mktemp("latents")
    write_pictures(root / "pictures", COUNT)
    write_autoencoder(root / "kl")
    write_autoencoder(root / "other", bias=1.0)
    write_autoencoder(root / "wider", channels=8)
    plan = prepare.Plan(
        str(root / "pictures"), str(root / "data"), str(root / "kl"), image_size=SIDE
    )
    prepare.prepare(plan._replace(flip=True))
    prepare.prepare(plan._replace(out=str(root / "pixels"), autoencoder="none"))
    return root


def plan_of(source, out, autoencoder) -> prepare.Plan:
    return prepare.Plan(str(source), str(out), str(autoencoder), image_size=SIDE)


def small_config(data_dir, **changes) -> ConfigDict:
    config = base.get_config()
    config.dataset_name, config.data_dir = "folder", str(data_dir)
    config.use_stable_vae, config.flip = 1, True
    config.batch_size, config.max_steps = 16, 6
    config.log_interval, config.eval_interval, config.save_interval = 3, 6, 6
    config.model.update({"depth": 1, "hidden_size": 32, "patch_size": 2, "num_heads": 2})
    config.sample.update({"steps": (1, 2), "num": 4})
    config.update_from_flattened_dict(changes)
    return config


@functools.cache  # a run takes seconds
def trained(place, objective: str, **changes):
    """The folder of a run of six steps."""
    name = "_".join([objective, *(f"{k}={v}" for k, v in changes.items())])
    config = small_config(place / "data", **changes)
    train(config, str(place / name), OBJECTIVES[objective])
    return place / name


@pytest.mark.parametrize("objective", [pytest.param("flow_matching", marks=thorough), "mean_flow"])
def test_both_objectives_train_and_draw_pictures(place, objective):
    run = trained(place, objective)
    pipeline = FlowPipeline.from_pretrained(run)
    assert pipeline.shape == (SIDE // 2, SIDE // 2, 4) and pipeline.num_classes == 3
    pictures = pipeline(np.arange(5) % 3, steps=2)
    assert pictures.shape == (5, SIDE, SIDE, 3) and pictures.dtype == np.uint8
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        "steps_1_0000006.png",
        "steps_2_0000006.png",
    ]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= lines[0]["data_wait"] <= 1


@pytest.mark.parametrize("cache", ["host", pytest.param("device", marks=thorough)])
def test_the_cache_changes_no_run(place, cache):
    a, b = (
        FlowPipeline.from_pretrained(trained(place, "mean_flow", cache=c)) for c in ("disk", cache)
    )
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_sample_of_the_moments_is_the_scaled_posterior(place):
    """What training sees is (mean + deviation · noise) · 0.18215 of the cropped pictures."""
    dataset = data.load(small_config(place / "data", holdout=0.0))
    codec = load_autoencoder(str(place / "kl")).autoencoder
    pictures = data.load_pictures(small_config(place / "data", holdout=0.0), dataset.origin)
    x = data.arrays(pictures.train)["x"]
    moments = np.asarray(jax.jit(codec.moments)(x))
    stored = data.arrays(dataset.train)
    np.testing.assert_allclose(stored["x"].astype(np.float32), moments, atol=2e-3, rtol=2e-3)
    keys = jax.random.split(jax.random.key(0), len(x))
    seen = np.asarray(codec.sample(jnp.asarray(stored["x"]), keys))
    again = np.asarray(codec.sample(jnp.asarray(stored["x"]), jax.random.split(keys[0], len(x))))
    mean, deviation = np.split(moments, 2, axis=-1)
    noise = (seen / 0.18215 - mean) / deviation
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert np.abs(seen - again).mean() > 0.1 * 0.18215 * deviation.mean()  # other keys, another one


def test_pictures_are_split_as_their_latents(place):
    config = small_config(place / "data", holdout=0.25)
    latents = data.load(config)
    pictures = data.load_pictures(config, latents.origin)
    pixels = data.load(small_config(place / "pixels", holdout=0.25, use_stable_vae=0))
    direct = small_config(place / "pictures", holdout=0.25, use_stable_vae=0, image_size=SIDE)
    direct = data.load(direct)
    assert pictures.identity == latents.origin["identity"] == direct.identity == pixels.identity
    for part in ("train", "heldout"):
        here, there, raw = (getattr(d, part) for d in (pictures, pixels, direct))
        assert 0 < len(here) == len(getattr(latents, part))
        labels = data.arrays(getattr(latents, part))["label"]
        for other in (here, there, raw):
            np.testing.assert_array_equal(data.arrays(other)["label"], labels)
            np.testing.assert_array_equal(data.arrays(other)["x"], data.arrays(here)["x"])


@thorough
def test_a_run_on_prepared_pictures_shares_a_table_with_one_on_latents(place):
    config = small_config(place / "pixels", use_stable_vae=0)
    train(config, str(place / "on_pixels"), objectives.flow_objective)
    found = runs.load_runs([trained(place, "mean_flow"), place / "on_pixels"])
    assert found["on_pixels"].pipeline.shape == (SIDE, SIDE, 3)
    plan = Plan(features=("classifier",), cache_dir=str(place / "cache"))
    ((members, yardstick),) = groups.group_runs(found, plan)
    assert set(members) == {"mean_flow", "on_pixels"}
    assert yardstick.dataset.shape == (SIDE, SIDE, 3)


def test_an_exported_model_carries_its_autoencoder(place, tmp_path):
    pipeline = FlowPipeline.from_pretrained(trained(place, "mean_flow"))
    pipeline.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["data_dir"] = "gone"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    loaded = FlowPipeline.from_pretrained(tmp_path / "model")
    labels = np.arange(4) % 3
    np.testing.assert_array_equal(pipeline(labels, steps=2), loaded(labels, steps=2))


def test_another_decoder_is_an_argument_and_not_a_constant(place):
    """The autoencoder's weights are an argument of the compiled sampler."""
    pipeline = FlowPipeline.from_pretrained(trained(place, "mean_flow"))
    labels = np.arange(8) % 3
    pictures = pipeline(labels)
    compiled = pipeline.sampler._cache_size()
    doubled = jax.tree.map(lambda a: 2 * a, pipeline.autoencoder)
    other = dataclasses.replace(pipeline, loaded=doubled)(labels)
    assert pipeline.sampler._cache_size() == compiled
    assert np.abs(pictures.astype(int) - other).mean() > 1


MISTAKES = [
    ({"data_dir": "pictures"}, r"pictures holds no latents: write latents with prepare_data.py"),
    ({"data_dir": ""}, r"no --data_dir given: write latents with prepare_data.py"),
    ({"data_dir": "pixels"}, r"holds pictures, not latents: train with --use_stable_vae=0"),
    ({"use_stable_vae": 0}, r"an autoencoder's moments, not pictures: .* --use_stable_vae=1"),
    ({"dataset_name": "imagenet256"}, r"prepared with --dataset_name=folder, which decides"),
    (
        {
            "data_dir": "pixels",
            "dataset_name": "celebahq256",
            "use_stable_vae": 0,
            "image_size": 16,
        },
        r"prepared with --dataset_name=folder, which decides",
    ),
    ({"use_stable_vae": 2}, r"use_stable_vae=2: give --use_stable_vae=0 or 1"),
    ({"image_size": 32}, r"was prepared at 16 pixels, not 32: give --image_size=16"),
    ({"autoencoder": "other"}, r"made by another autoencoder \(fingerprint \w+\) than .*other"),
    ({"autoencoder": "wider"}, r"made by another autoencoder \(fingerprint \w+\) than .*wider"),
    ({"autoencoder": "nowhere"}, r"nowhere"),
    ({"cache": "ram"}, r"cache='ram': one of disk, host, device"),
]


@pytest.mark.parametrize(("changes", "told"), MISTAKES, ids=[str(m[0]) for m in MISTAKES])
def test_mistakes_are_told_in_one_line(place, tmp_path, changes, told):
    changes = {"data_dir": "data"} | changes
    for key in ("data_dir", "autoencoder"):
        if changes.get(key):
            changes[key] = str(place / changes[key])
    with pytest.raises(UserError, match=told) as error:
        train(small_config(**changes), str(tmp_path / "run"), objectives.flow_objective)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cache", feed.CACHES)
def test_what_has_no_mirrored_side_is_not_flipped(place, tmp_path, cache):
    if not (place / "plain").exists():
        prepare.prepare(plan_of(place / "pictures", place / "plain", place / "kl"))
    with pytest.raises(UserError, match="no mirrored moments: prepare it with --flip"):
        config = small_config(place / "plain", cache=cache)
        train(config, str(tmp_path / "run"), objectives.flow_objective)
    assert not (tmp_path / "run").exists()


def test_corrupt_pictures_that_were_left_out_are_left_out_of_comparisons(place, tmp_path):
    write_pictures(tmp_path / "pictures", COUNT)
    names = sorted((tmp_path / "pictures").rglob("*.jpg"))
    for file in (names[3], names[-1]):
        file.write_bytes(file.read_bytes()[:300])
    plan = plan_of(tmp_path / "pictures", tmp_path / "data", place / "kl")
    prepare.prepare(plan._replace(skip_corrupt=True))
    pixels = plan._replace(out=str(tmp_path / "pixels"), autoencoder="none", skip_corrupt=True)
    prepare.prepare(pixels)
    config = small_config(tmp_path / "data", holdout=0.25)
    latents = data.load(config)
    pictures = data.load_pictures(config, latents.origin)
    files = data.load(small_config(tmp_path / "pixels", holdout=0.25, use_stable_vae=0))
    assert pictures.identity == latents.origin["identity"] == files.identity
    assert len(pictures.train) + len(pictures.heldout) == COUNT - 2
    for part in ("train", "heldout"):
        labels = data.arrays(getattr(latents, part))["label"]
        assert list(data.arrays(getattr(pictures, part))["label"]) == list(labels)


def test_latents_without_their_copy_of_the_autoencoder(place, tmp_path):
    shutil.copytree(place / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "autoencoder")
    with pytest.raises(UserError, match="no copy of the autoencoder: give --autoencoder=FOLDER"):
        train(small_config(tmp_path / "data"), str(tmp_path / "run"), objectives.flow_objective)
    config = small_config(tmp_path / "data", autoencoder=str(place / "kl"))
    train(config, str(tmp_path / "run"), objectives.flow_objective)


def test_other_data_in_the_same_folder_is_another_run(place, tmp_path):
    run = tmp_path / "run"
    train(small_config(place / "data"), str(run), objectives.flow_objective)
    write_pictures(tmp_path / "pictures", COUNT + 1)
    plan = prepare.Plan(
        str(tmp_path / "pictures"),
        str(tmp_path / "data"),
        str(place / "kl"),
        image_size=SIDE,
        flip=True,
    )
    prepare.prepare(plan)
    with pytest.raises(UserError, match="holds a run on folder"):
        train(small_config(tmp_path / "data", max_steps=12), str(run), objectives.flow_objective)
    assert shards.read_card(tmp_path / "data").count == COUNT + 1


def test_the_pictures_are_found_from_any_folder(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    prepare.prepare(plan_of("pictures", tmp_path / "data", "kl"))
    monkeypatch.chdir(tmp_path)
    latents = data.load(small_config("data", flip=False))
    pictures = data.load_pictures(small_config("data"), latents.origin)
    assert len(pictures.train) == len(latents.train)
    assert pictures.train[0]["x"].shape == (SIDE, SIDE, 3)
    shutil.copytree(place / "pictures", tmp_path / "moved")
    moved = data.load_pictures(small_config("data"), latents.origin, "moved")
    assert moved.identity == pictures.identity == latents.origin["identity"]
