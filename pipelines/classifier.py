"""Data set → an extractor of features trained on the spot, and cached.

The extractor is a small classifier of the data set itself, trained in seconds: enough to compare
runs on one data set, and no substitute for FID. Its distance is called `fd_classifier`, or
`fd_rotation_classifier` where the data set has no labels and the classifier learns to tell the four
rotations of a picture (Gidaris et al. 2018, arXiv 1803.07728).
"""

import hashlib
import os
import pathlib
import sys
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import Partial

from models.classifier import FEATURES, Classifier
from pipelines.extractors import Extractor
from utils import data, files
from utils.cli import UserError
from utils.log import progress
from utils.sources import fingerprint

CHUNK = 512  # pictures per call of the extractor


class Recipe(NamedTuple):
    """How the classifier is trained: AdamW, cosine schedule to 0, random shifts."""

    steps: int = 600
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 1e-2
    shift: float = 1 / 8  # the most a picture is moved, as a share of its size; edges are repeated
    seed: int = 0


class _Task(NamedTuple):
    """What is learnt: its name, its number of classes, and batch → (pictures, labels)."""

    name: str
    num_classes: int
    prepare: Callable[[dict], tuple[np.ndarray, np.ndarray]]


def extractor(
    dataset: data.Dataset, cache_dir: str | os.PathLike, recipe: Recipe | None = None
) -> Extractor:
    """Returns the data set's classifier, from the cache or trained on the spot.

    Args:
      dataset: uint8 pictures.
      cache_dir: holds one npz file per data set (by fingerprint) and recipe.
      recipe: of the classifier; None: the defaults.

    Raises:
      UserError: no labels and pictures that are not square.
    """
    recipe = recipe or Recipe()
    pathlib.Path(cache_dir).mkdir(parents=True, exist_ok=True)  # not after the work
    task = _task(dataset)
    recorded = (dataset.fingerprint, FEATURES, recipe, "network and accuracy")
    key = hashlib.sha256(repr(recorded).encode()).hexdigest()[:16]
    path = pathlib.Path(cache_dir) / f"{task.name}_{dataset.name}_{key}.npz"
    saved = _load(path)
    if saved is None:
        params = _train(dataset, task, recipe)
        saved = params, _accuracy(params, dataset.heldout, task)
        if jax.process_index() == 0:
            _save(path, *saved)
    params, accuracy = (_load(path) if path.exists() else None) or saved  # of who was last
    words = _words(accuracy, dataset, task, recipe)
    return Extractor(
        task.name, "", words, _digest(params), Partial(_pooled, params), {"pool": FEATURES}
    )


def _digest(params: dict) -> str:
    """12 hexadecimal digits of the weights: numbers of another training are others."""
    leaves = sorted(flatten_dict(params, sep="/").items())
    return fingerprint(*(part for name, leaf in leaves for part in (name, np.asarray(leaf))))


def _task(dataset: data.Dataset) -> _Task:
    if dataset.num_classes > 1:
        return _Task("classifier", dataset.num_classes, lambda b: (b["x"], b["label"]))
    if dataset.shape[0] != dataset.shape[1]:
        raise UserError(
            f"{dataset.name} has no labels, and telling rotations needs square pictures, "
            f"not {dataset.shape[0]}×{dataset.shape[1]}: set image_size"
        )
    return _Task("rotation_classifier", 4, _rotations)


def _rotations(batch: dict) -> tuple[np.ndarray, np.ndarray]:
    """Every picture four times, with the number of quarter turns as its label."""
    x = batch["x"]
    turned = np.concatenate([np.rot90(x, turns, axes=(1, 2)) for turns in range(4)])
    return turned, np.repeat(np.arange(4, dtype=np.int32), len(x))


def _words(accuracy: float, dataset: data.Dataset, task: _Task, recipe: Recipe) -> str:
    told = "telling four rotations" if task.prepare is _rotations else "telling its classes"
    learnt = "no held-out split" if np.isnan(accuracy) else f"held-out accuracy {accuracy:.3f}"
    return (
        f"{FEATURES} features of a small convolutional classifier, trained for {recipe.steps} steps"
        f" on the training split of {dataset.name} at {told} ({learnt}); not FID"
    )


def _pooled(params, pictures) -> dict[str, jax.Array]:
    """`Extractor.apply`: the features of uint8 pictures (n, H, W, C)."""
    return {"pool": _apply(params, pictures)[0]}


@jax.jit
def _apply(params, pictures):
    """Returns features and logits of uint8 pictures (n, H, W, C)."""
    num_classes = params["params"]["Dense_0"]["bias"].shape[0]
    with jax.default_matmul_precision("highest"):  # on TPUs float32 products are rounded otherwise
        return Classifier(num_classes).apply(params, pictures)


def _train(dataset: data.Dataset, task: _Task, recipe: Recipe) -> dict:
    """Trains the classifier; a function of the data set and the recipe alone."""
    model = Classifier(task.num_classes)
    schedule = optax.cosine_decay_schedule(recipe.lr, recipe.steps)
    optimizer = optax.adamw(schedule, weight_decay=recipe.weight_decay)
    key = jax.random.key(recipe.seed)
    params = jax.jit(model.init)(key, np.zeros((1, *dataset.shape), np.uint8))
    state, step = optimizer.init(params), _step(model, optimizer, recipe.shift)
    copies = 4 if task.prepare is _rotations else 1
    size = min(max(1, recipe.batch_size // copies), len(dataset.train))
    batches = data.batches(dataset.train, batch_size=size, seed=recipe.seed)
    with progress(0, recipe.steps, "step", f"{task.name} of {dataset.name}") as bar:
        for i in range(recipe.steps):
            pictures, labels = task.prepare(next(batches))
            params, state, loss = step(params, state, pictures, labels, jax.random.fold_in(key, i))
            loss.block_until_ready()  # unbounded dispatch can abort on several CPU devices
            bar.update()
    return params


def _step(model: Classifier, optimizer: optax.GradientTransformation, share: float) -> Callable:
    def loss_of(params, pictures, labels):
        logits = model.apply(params, pictures)[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state, pictures, labels, key):
        keys = jax.random.split(key, len(pictures))
        pictures = jax.vmap(lambda k, x: _shifted(k, x, share))(keys, pictures)
        loss, grads = jax.value_and_grad(loss_of)(params, pictures, labels)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer's power
            updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def _shifted(key: jax.Array, picture: jax.Array, share: float) -> jax.Array:
    """Moves a picture (H, W, C) by up to `share` of its size either way; edges are repeated."""
    height, width = (int(share * size) for size in picture.shape[:2])
    padded = jnp.pad(picture, ((height, height), (width, width), (0, 0)), mode="edge")
    corner = jax.random.randint(key, (2,), 0, jnp.array([2 * height + 1, 2 * width + 1]))
    return jax.lax.dynamic_slice(padded, (corner[0], corner[1], 0), picture.shape)


def _accuracy(params, heldout, task: _Task) -> float:
    """Share of right answers; NaN where there is nothing to ask."""
    right = total = 0
    for chunk in data.chunks(heldout, CHUNK):
        pictures, labels = task.prepare(chunk)
        right += int((np.asarray(_apply(params, pictures)[1]).argmax(1) == labels).sum())
        total += len(labels)
    return right / total if total else float("nan")


def _save(path: pathlib.Path, params, accuracy: float) -> None:
    arrays: dict[str, Any] = {
        name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep="/").items()
    }
    arrays["accuracy"] = np.float64(accuracy)
    files.write(path, lambda file: np.savez(file, **arrays))


def _load(path: pathlib.Path) -> tuple[dict, float] | None:
    """Reads what `_save` wrote; None, and a line that says so, where the file is damaged."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = dict(file)
        accuracy = float(arrays.pop("accuracy"))
        params = unflatten_dict({name: jnp.asarray(a) for name, a in arrays.items()}, sep="/")
        return {"params": params["params"]}, accuracy
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        print(f"{path} is damaged ({error}): computing it again", file=sys.stderr)
        return None
