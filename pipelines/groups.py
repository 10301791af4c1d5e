"""What can be compared: runs by data set, pictures made elsewhere, and the yardstick of each."""

import dataclasses
import pathlib
import zipfile
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from pipelines import classifier, extractors, measure, reference
from pipelines.extractors import Extractor
from pipelines.flow import FlowPipeline
from pipelines.measure import Reference
from pipelines.plan import CLASSIFIER, FEWEST, Plan, wanted_metrics
from pipelines.runs import Run
from pipelines.yardsticks import PictureYardstick, PointYardstick, Yardstick, trained_on
from utils import data
from utils.cli import UserError
from utils.samples import Samples, open_samples

Groups = list[tuple[dict[str, Run], Yardstick]]


def group_runs(runs: Mapping[str, Run], plan: Plan) -> Groups:
    """Runs by data set; several data sets share a call only where they are points.

    Raises:
      UserError: runs on different pictures, other data than they were trained on, or what the
        references and extractors raise.
    """
    if plan.reference and CLASSIFIER not in plan.features and "nearest" not in plan.metrics:
        return [(dict(runs), _against_reference(runs, plan))]
    found: dict[str, tuple[dict[str, Run], data.Dataset]] = {}
    for name, run in runs.items():
        dataset = _dataset(run, plan)
        found.setdefault(dataset.fingerprint, ({}, dataset))[0][name] = run
    if len(found) > 1 and any(len(dataset.shape) > 1 for _, dataset in found.values()):
        told = ", ".join(f"{next(iter(r))} on {dataset.name}" for r, dataset in found.values())
        raise UserError(f"runs on different data sets ({told}): evaluate each data set by itself")
    return [(members, _of_dataset(dataset, plan)) for members, dataset in found.values()]


def _dataset(run: Run, plan: Plan) -> data.Dataset:
    """The pictures or points that a run was trained on."""
    card = run.pipeline.card
    dataset = data.load_pictures(run.pipeline.config, card.get("pictures"), plan.data_dir)
    here = dataset.identity
    there = (card.get("pictures") or {}).get("identity") or card.get("dataset", here)
    if there != here:
        raise UserError(
            f"{run.name} was trained on {there}, the data here is {here}: see --data_dir"
        )
    return dataset


def _of_dataset(dataset: data.Dataset, plan: Plan) -> Yardstick:
    if len(dataset.shape) == 1:
        most = min(len(dataset.heldout), len(dataset.train))
        if plan.num_samples > most:
            raise UserError(
                f"{dataset.name} has {most} held-out points: --num_samples={most} or less"
            )
        return PointYardstick(dataset, plan)
    return picture_yardstick(plan, dataset.shape, dataset)


def _against_reference(runs: Mapping[str, Run], plan: Plan) -> Yardstick:
    """Compares with --reference alone: the data that the runs were trained on may be elsewhere."""
    shapes = {run.name: picture_shape(run.pipeline) for run in runs.values()}
    shape = next(iter(shapes.values()))
    if len(set(shapes.values())) > 1 or len(shape) == 1:
        told = ", ".join(f"{name} {'×'.join(map(str, s))}" for name, s in shapes.items())
        raise UserError(f"--reference needs runs on pictures of one size, not {told}")
    return picture_yardstick(plan, shape)


def picture_shape(pipeline: FlowPipeline) -> tuple[int, ...]:
    """The shape of one picture, or point, that a pipeline draws."""
    latents = jax.ShapeDtypeStruct((1, *pipeline.shape), jnp.float32)
    return jax.eval_shape(pipeline.autoencoder.decode, latents).shape[1:]


def of_samples(plan: Plan) -> list[tuple[str, Samples, Yardstick]]:
    """Pictures made elsewhere, by name, with the yardstick of all.

    Raises:
      UserError: pictures of several sizes, or what opening them raises.
    """
    found = [(pathlib.Path(path), open_samples(path, plan.image_size)) for path in plan.samples]
    shapes = {samples.shape for _, samples in found}
    if len(shapes) > 1:
        told = ", ".join(f"{path} {s.shape[1]} × {s.shape[0]}" for path, s in found)
        raise UserError(f"pictures of one size share a table, not {told}: see --image_size")
    names = [_named(path) for path, _ in found]
    if len(set(names)) < len(names):
        raise UserError(
            f"--samples of one name cannot share a table: {', '.join(names)}; rename one"
        )
    for (path, samples), n in zip(found, [plan.num_samples] * len(found), strict=True):
        if len(samples.source) < max(n, FEWEST):
            raise UserError(
                f"{path} holds {len(samples.source)} pictures: --num_samples={n} needs as many"
            )
    stick = picture_yardstick(plan, next(iter(shapes)))
    return [(name, samples, stick) for name, (_, samples) in zip(names, found, strict=True)]


def _named(path: pathlib.Path) -> str:
    """What a table calls a folder or file; what follows a folder's dot is part of its name."""
    path = path.expanduser().resolve()
    return (path.name if path.is_dir() else path.stem).lstrip(".") or "samples"


def picture_yardstick(
    plan: Plan, shape: Sequence[int], dataset: data.Dataset | None = None
) -> Yardstick:
    """Extractors and references for pictures of a shape (H, W, C).

    Args:
      dataset: what is compared with where the plan names no reference, and what a classifier is
        trained on.

    Raises:
      UserError: what loading raises, or a reference that cannot serve the metrics.
    """
    if len(shape) != 3:
        raise UserError("points have no pictures' features: leave --fid.num=0")
    chosen = load_extractors(plan, dataset)
    if plan.reference:
        references = _references(plan, chosen, shape)
    else:
        assert dataset is not None
        references = reference.of_pictures(
            dataset.train,
            chosen,
            words=trained_on(dataset),
            identity=dataset.fingerprint,
            cache_dir=plan.cache_dir,
            batch_size=plan.batch_size,
        )
    for one, against in zip(chosen, references, strict=True):
        measure.check_reference(against, one, wanted_metrics(plan, one) if plan.metrics else ())
    title = dataset.name if dataset else pathlib.Path(plan.reference).name
    return PictureYardstick(
        title, (shape[0], shape[1], shape[2]), plan, tuple(chosen), tuple(references), dataset
    )


# Extractors and references.


def load_extractors(plan: Plan, dataset: data.Dataset | None) -> list[Extractor]:
    """The extractors of a plan, one per protocol; `dataset` is what a classifier is trained on."""
    found = []
    for i, name in enumerate(plan.features):
        if name == CLASSIFIER:
            if dataset is None:
                raise UserError("--features=classifier is trained on a run's data set: name one")
            found.append(classifier.extractor(dataset, plan.cache_dir))
            continue
        weights = plan.weights[i] if i < len(plan.weights) else ""
        has = extractors.PROTOCOLS[name]
        for protocol in [p for p in plan.protocol if p in has] or has[:1]:
            found.append(extractors.load(name, protocol, weights, plan.cache_dir))
    return found


def _references(plan: Plan, chosen: Sequence[Extractor], shape: Sequence[int]) -> list[Reference]:
    """What --reference holds: statistics, pictures, or both."""
    path = pathlib.Path(plan.reference).expanduser()
    arrays = _arrays_in(path)
    pictures = not arrays or "arr_0" in arrays
    seen = _of_pictures(path, plan, chosen, shape) if pictures else []
    if seen and not arrays & {"mu", "ref_mu"}:
        return seen
    stats = [reference.of_file(path, one, shape[0]) for one in chosen]
    if len(chosen) > 1:
        raise UserError(
            f"{path} holds statistics of one kind of features and one protocol: name one of "
            "--features and one of --protocol, or give pictures as --reference"
        )
    if not seen:
        return stats
    return [dataclasses.replace(s, features=p.features) for s, p in zip(stats, seen, strict=True)]


def _of_pictures(
    path: pathlib.Path, plan: Plan, chosen: Sequence[Extractor], shape: Sequence[int]
) -> list[Reference]:
    """Photographs are cropped to the samples' size; what is no square must have it."""
    square = shape[0] == shape[1]
    found = open_samples(path, plan.image_size or (shape[0] if square else 0))
    if tuple(found.shape[:2]) != tuple(shape[:2]):
        raise UserError(
            f"{path} holds pictures of {found.shape[1]} × {found.shape[0]} pixels, the samples "
            f"have {shape[1]} × {shape[0]}: compare pictures of one size"
        )
    return reference.of_pictures(
        found.source,
        chosen,
        words=found.words,
        identity=found.fingerprint,
        cache_dir=plan.cache_dir,
        batch_size=plan.batch_size,
    )


def _arrays_in(path: pathlib.Path) -> set[str]:
    """The names of an .npz file's arrays; none where it is no such file."""
    if path.suffix != ".npz" or not path.is_file():
        return set()
    try:
        with zipfile.ZipFile(path) as file:
            return {name.removesuffix(".npy") for name in file.namelist()}
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is no whole .npz ({error}): fetch it again") from error
