"""What TFDS prepared, read back exactly and without TensorFlow; and what it says when it cannot be.

The builders have the features of TFDS's imagenet2012 and celeb_a_hq and of the community's
celebahq256 (the one that kvfrans/jax-flow loads); TFDS itself writes their records.
"""

import io
import json
import runpy
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.base import get_config
from utils import data, tfds
from utils.cli import UserError
from utils.pictures import open_pictures
from utils.sources import CorruptPicture, Pictures, centre_crop, key

ROOT = Path(__file__).parents[1]


def prepare(root: Path, dataset: str, features: dict, splits: dict[str, list], **keys) -> Path:
    """Lets TFDS write `splits` as array_record, in two files each; returns the version's folder."""
    import tensorflow_datasets

    tensorflow_datasets.disable_progress_bar()
    core = tensorflow_datasets.core
    config, version = keys.get("config"), core.Version(keys.get("version", "1.0.0"))

    class Builder(core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset
        VERSION = version
        BUILDER_CONFIGS = [core.BuilderConfig(name=config, version=version)] if config else []
        __module__ = "builder"  # of a package's module TFDS asks for importlib_resources

        def _info(self):
            return core.DatasetInfo(
                builder=self, features=tensorflow_datasets.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {split: enumerate(records) for split, records in splits.items()}

        def _generate_examples(self):
            raise AssertionError("its splits are generators themselves")

    builder = Builder(data_dir=root, file_format="array_record")
    in_two = tensorflow_datasets.download.DownloadConfig(num_shards=2)
    builder.download_and_prepare(download_config=in_two)
    return Path(builder.data_dir)


def features(*names: str, **more) -> dict:
    """Features by the names that the three data sets have."""
    from tensorflow_datasets import features as f

    known = {
        "jpeg": {"image": f.Image(encoding_format="jpeg")},
        "256": {"image": f.Image(shape=(256, 256, 3), encoding_format="png")},
        "1000": {"label": f.ClassLabel(names=[f"n{i:08}" for i in range(1000)])},
        "sex": {"label": f.ClassLabel(names=["female", "male"])},
        "file_name": {"file_name": f.Text()},
        "image/filename": {"image/filename": f.Text()},
    }
    return {key: value for name in names for key, value in known[name].items()} | more


def encoded(seed: int, kind: str, *shape: int) -> bytes:
    """A picture of smooth noise, so that JPEG keeps it small."""
    coarse = np.random.default_rng(seed).integers(256, size=(5, 4, *shape[2:]), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(shape[1::-1]).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> tuple[Path, dict[int, bytes]]:
    """Root of a small imagenet2012, and its pictures by label, of which each has one of its own."""
    root = tmp_path_factory.mktemp("imagenet")
    shapes = [(256, 256, 3), (300, 400, 3), (700, 530, 3), (280, 290), (200, 180, 3)] * 4
    pictures = {37 * i % 1000: encoded(i, "jpeg", *shape) for i, shape in enumerate(shapes)}
    records = [
        {"image": io.BytesIO(content), "label": label, "file_name": f"n{label:08}_1.JPEG"}
        for label, content in pictures.items()
    ]
    test = [{"image": io.BytesIO(encoded(0, "jpeg", 9, 9, 3)), "label": -1, "file_name": "t"}] * 2
    names = features("jpeg", "1000", "file_name")
    splits = {"train": records, "test": test}
    prepare(root, "imagenet2012", names, splits, version="5.1.0")
    return root, pictures


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> tuple[Path, list[bytes]]:
    """Root of a small celeb_a_hq/256 and of the community's celebahq256, and their pictures."""
    root = tmp_path_factory.mktemp("faces")
    pictures = [encoded(i, "png", 256, 256, 3) for i in range(6)]
    official = [
        {"image": io.BytesIO(content), "image/filename": f"{i}.png"}
        for i, content in enumerate(pictures)
    ]
    names = features("256", "image/filename")
    prepare(root, "celeb_a_hq", names, {"train": official}, config="256", version="2.0.0")
    community = []
    for i, content in enumerate(pictures):
        (root / f"{i}.png").write_bytes(content)
        community.append({"image": str(root / f"{i}.png"), "label": i % 2})
    splits = {"train": community[:4], "validation": community[4:]}
    prepare(root, "celebahq256", features("256", "sex"), splits)
    return root, pictures


def config(name: str, place, **keys):
    config = get_config()
    config.update({"dataset_name": name, "data_dir": str(place), "holdout": 0.0} | keys)
    return config


def contents(pictures: Pictures) -> list[tuple[bytes, int]]:
    return [pictures.read(index) for index in range(len(pictures.keys))]


def assert_one_line(call, *words: str, kind: type[UserError] = UserError):
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


# Found, and exact.


def test_imagenet_by_name_and_by_folder_is_what_was_put_in(imagenet, monkeypatch):
    root, known = imagenet
    version = root / "imagenet2012" / "5.1.0"
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    found = [
        open_pictures("imagenet2012"),
        open_pictures("imagenet2012", data_dir=str(root)),
        open_pictures("imagenet2012:5.1.0"),
        open_pictures(str(version)),
        open_pictures(str(version.parent), dataset_name="imagenet256"),
        open_pictures(str(root), dataset_name="imagenet256"),
        open_pictures("", dataset_name="imagenet256"),
    ]
    assert {pictures.where for pictures in found} == {str(version)}
    assert len({pictures.fingerprint for pictures in found}) == 1
    assert found[0].num_classes == 1000 and len(found[0].keys) == len(known)
    for pictures in (found[0], found[-1]):
        assert {label: content for content, label in contents(pictures)} == known


def test_pixels_of_imagenet_are_those_of_the_crop(imagenet):
    root, known = imagenet
    dataset = data.load(config("imagenet256", root, use_stable_vae=0))
    assert (dataset.shape, dataset.num_classes) == ((256, 256, 3), 1000)
    batch = data.arrays(dataset.train)
    assert sorted(batch["label"]) == sorted(known) and batch["label"].dtype == np.int32
    mirrored = np.arange(len(known)) % 3 == 0
    turned = dataset.train.gather(range(len(known)), mirrored)
    for i, label in enumerate(batch["label"]):
        picture = Image.open(io.BytesIO(known[int(label)])).convert("RGB")
        expected = np.asarray(centre_crop(picture, 256))
        np.testing.assert_array_equal(batch["x"][i], expected)
        np.testing.assert_array_equal(turned["x"][i], expected[:, ::-1] if i % 3 == 0 else expected)


def test_celebahq_has_no_labels(faces):
    root, known = faces
    for place, name in [("celeb_a_hq/256", "folder"), (root / "celeb_a_hq/256", "celebahq256")]:
        pictures = open_pictures(str(place), dataset_name=name, data_dir=str(root))
        assert pictures.num_classes == 0
        assert sorted(contents(pictures)) == sorted((content, 0) for content in known)
    dataset = data.load(config("folder", root / "celeb_a_hq" / "256"))
    assert dataset.shape == (256, 256, 3)
    x = data.arrays(dataset.train)["x"]
    expected = [np.asarray(Image.open(io.BytesIO(content))).tobytes() for content in known]
    assert sorted(picture.tobytes() for picture in x) == sorted(expected)


def test_the_labels_of_the_community_builder_are_left_out_for_celebahq(faces):
    root, known = faces
    by_sex = open_pictures("celebahq256", data_dir=str(root))
    assert by_sex.num_classes == 2
    labelled = [(content, i % 2) for i, content in enumerate(known)]
    assert sorted(contents(by_sex)) == sorted(labelled[:4])
    validation = open_pictures("celebahq256", data_dir=str(root), split="validation")
    assert sorted(contents(validation)) == sorted(labelled[4:])
    dataset = data.load(config("celebahq256", root))  # of the two in the root, the community's
    assert dataset.num_classes == 0 and len(dataset.train) == 4
    assert not data.arrays(dataset.train)["label"].any()


def test_splits_have_keys_and_fingerprints_of_their_own(faces):
    root = str(faces[0])
    keys = {"source": "celebahq256", "data_dir": root}
    train, part = open_pictures(**keys), open_pictures(**keys, split="train[:2]")
    validation = open_pictures(**keys, split="validation")
    unlabelled = open_pictures(**keys, dataset_name="celebahq256")
    assert len({p.fingerprint for p in (train, part, validation, unlabelled)}) == 4
    assert train.keys.dtype == np.uint64 and train.name(3) == "train[3]"
    assert train.keys.tolist() == [key(f"train[{i}]") for i in range(4)]
    assert contents(part) == contents(train)[:2]
    assert not set(train.keys) & set(validation.keys)


def test_the_newest_version_is_taken(tmp_path):
    for name in ("1.9.0", "1.10.0", "incomplete.ABC_2.0.0", "1.2.0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset_info.json").touch()
    (tmp_path / "3.0.0").mkdir()  # holds nothing
    assert tfds.find(tmp_path) == tmp_path / "1.10.0"
    assert tfds.find(tmp_path / "1.9.0") == tmp_path / "1.9.0"
    assert tfds.find(tmp_path / "3.0.0") is None


def test_sixteen_threads_read_what_one_reads(imagenet):
    root, known = imagenet
    indices = np.random.default_rng(0).integers(len(known), size=2000).tolist()
    expected = contents(open_pictures("imagenet2012", data_dir=str(root)))
    pictures = open_pictures("imagenet2012", data_dir=str(root))  # no file of it is open yet
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(pictures.read, indices))
    assert found == [expected[index] for index in indices]


def test_neither_tensorflow_nor_an_early_import_of_tfds_is_needed(faces):
    code = (
        "import sys; from utils.pictures import open_pictures\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        f"print(len(open_pictures('celeb_a_hq/256', data_dir={str(faces[0])!r}).read(0)[0]))\n"
        "assert 'tensorflow' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and int(run.stdout) > 100, run.stderr


# What cannot be read, and how to mend it.


def test_what_is_not_there_is_told_with_its_mend(imagenet, faces, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    place = str(tmp_path)
    assert_one_line(lambda: open_pictures("nowhere"), "nowhere", place, "--data_dir")
    assert_one_line(lambda: open_pictures(""), "--data_dir")
    for name, archive in [("imagenet2012", "img_train.tar"), ("celeb_a_hq/256", "data256x256.tar")]:
        mend = (place, archive, "EXTRAS=prepare", f"'{name}'", "file_format='array_record'")
        assert_one_line(lambda name=name: open_pictures(name), *mend)
    assert_one_line(lambda: data.load(config("celebahq256", "")), "celebahq256", "256x256.tar")
    assert_one_line(lambda: open_pictures(str(faces[0] / "celeb_a_hq")), "give one of 256")
    root = str(imagenet[0])
    assert_one_line(
        lambda: open_pictures("imagenet2012", data_dir=root, split="validation"),
        "validation",
        "there are test, train",
    )
    test = open_pictures("imagenet2012", data_dir=root, split="test")
    assert_one_line(lambda: test.read(1), "test[1]", "no label")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "0.png").write_bytes(encoded(0, "png", 8, 8, 3))
    assert_one_line(lambda: open_pictures(str(tmp_path / "tree"), split="validation"), "split")


def test_a_picture_cut_short_is_named(tmp_path):
    whole = encoded(0, "jpeg", 256, 256, 3)
    contents = [whole, whole[:-200], whole, b"", b"no picture"]
    records = [{"image": io.BytesIO(c), "label": i} for i, c in enumerate(contents)]
    folder = prepare(tmp_path, "cut", features("jpeg", "1000"), {"train": records})
    pictures = open_pictures(str(folder))
    places = {pictures.read(index)[1]: index for index in range(5)}
    for label in (1, 3, 4):
        name = f"{folder}/train[{places[label]}]"
        assert_one_line(lambda i=places[label]: pictures.picture(i), name, kind=CorruptPicture)
    assert pictures.picture(places[2])[0].size == (256, 256)
    dataset = data.load(config("folder", folder, image_size=64))
    assert_one_line(lambda: data.arrays(dataset.train), "train[", kind=CorruptPicture)


def test_other_features_are_refused(tmp_path):
    from tensorflow_datasets import features as f

    record = {"image": io.BytesIO(encoded(0, "png", 256, 256, 3)), "label": 1}
    more = {"other": f.ClassLabel(num_classes=3), "mask": f.Image(encoding_format="png")}
    cases = {
        "labels": (["256", "sex"], "other", record | {"other": 2}),
        "images": (["256", "sex"], "mask", record | {"mask": record["image"]}),
        "words": (["file_name"], None, {"file_name": "a"}),
    }
    for name, (names, extra, value) in cases.items():
        spec = features(*names, **({extra: more[extra]} if extra else {}))
        folder = prepare(tmp_path, name, spec, {"train": [value, value]})
        words = [str(folder), extra or "file_name"]
        assert_one_line(lambda folder=folder: open_pictures(str(folder)), *words)
    unlabelled = open_pictures(str(tmp_path / "labels"), dataset_name="celebahq256")
    assert [label for _, label in contents(unlabelled)] == [0, 0]


def test_damaged_folders_are_told(faces, tmp_path):
    source = faces[0] / "celebahq256" / "1.0.0"
    for name in ("lacks", "info", "features", "cut"):
        shutil.copytree(source, tmp_path / name)
    file = "celebahq256-train.array_record-00001-of-00002"
    (tmp_path / "lacks" / file).unlink()
    (tmp_path / "info" / "dataset_info.json").write_text("{")
    (tmp_path / "features" / "features.json").unlink()
    content = (source / file).read_bytes()
    (tmp_path / "cut" / file).write_bytes(content[: len(content) // 2])
    assert_one_line(lambda: open_pictures(str(tmp_path / "lacks")), "1 of its 2 files", file)
    assert_one_line(lambda: open_pictures(str(tmp_path / "info")), str(tmp_path / "info"))
    assert_one_line(lambda: open_pictures(str(tmp_path / "features")), str(tmp_path / "features"))
    cut = open_pictures(str(tmp_path / "cut"))
    assert_one_line(lambda: contents(cut), str(tmp_path / "cut"), "train[")


def as_tfrecord(folder: Path) -> None:
    """Makes a prepared version what it would be as tfrecord."""
    import tensorflow_datasets

    info = folder / "dataset_info.json"
    raw = tensorflow_datasets.decode.DeserializeMethod.RAW_BYTES
    builder = tensorflow_datasets.builder_from_directory(folder)
    for split in builder.info.splits.values():
        records = builder.as_data_source(split.name, deserialize_method=raw)
        start = 0
        for path, count in zip(split.filepaths, split.shard_lengths, strict=True):
            framed = b""
            for record in (records[i] for i in range(start, start + count)):
                framed += struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0)
            Path(str(path).replace("array_record", "tfrecord")).write_bytes(framed)
            start += count
            Path(path).unlink()
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))


def test_tfrecord_is_told_with_the_command_that_converts_it(faces, tmp_path):
    source = faces[0] / "celebahq256" / "1.0.0"
    folder = tmp_path / "celebahq256" / "1.0.0"
    shutil.copytree(source, folder)
    as_tfrecord(folder)
    command = f"python scripts/convert_tfds.py --folder={folder}"
    for place in (folder, folder.parent):
        assert_one_line(lambda place=place: open_pictures(str(place)), "tfrecord", command)
    script = runpy.run_path(str(ROOT / "scripts" / "convert_tfds.py"))
    shard = folder / "celebahq256-train.tfrecord-00001-of-00002"
    content = shard.read_bytes()
    for cut in (len(content) - 1, len(content) // 2, 5):
        shard.write_bytes(content[:cut])
        assert_one_line(lambda: script["convert"](folder), shard.name)
        assert_one_line(lambda: open_pictures(str(folder)), command)  # still, since unfinished
    shard.write_bytes(b"")
    assert_one_line(lambda: script["convert"](folder), "0 records")
    shard.write_bytes(content)
    script["convert"](folder)
    for split in ("train", "validation"):
        one, other = (open_pictures(str(p), split=split) for p in (source, folder))
        assert contents(one) == contents(other) and one.fingerprint == other.fingerprint
