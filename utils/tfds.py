"""Reads what TensorFlow Datasets prepared as array_record, without TensorFlow.

A data set lies in ROOT/NAME[/CONFIG]/VERSION with dataset_info.json beside its records, see
https://www.tensorflow.org/datasets. TFDS itself is imported when data is opened: it takes a second.
"""

import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from utils.classes import readable
from utils.cli import UserError
from utils.sources import Pictures, fingerprint, key

_INFO = "dataset_info.json"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NAME = re.compile(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?")
_OWN = r"tensorflow_datasets\.core\.features\."
_CLASS_KEYS = ("type", "pythonClassName", "python_class_name")
_FETCHED = ("cifar10",)  # what TFDS downloads itself
# What TFDS asks the user to fetch by hand. Its command line is not used: it loads Apache Beam, no
# version of which fits the packages pinned here.
_BY_HAND = {
    "imagenet2012": "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar",
    "celeb_a_hq/256": "data256x256.tar",
}


# Where data sets lie.


def root(data_dir: str = "") -> pathlib.Path:
    """The folder of all TFDS data sets: `data_dir`, $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    place = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(place).expanduser()


def find(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns `folder` if it is a prepared version, else its newest version, else None."""
    if (folder / _INFO).is_file():
        return folder
    found = [info.parent for info in folder.glob(f"*/{_INFO}")]
    versions = [path for path in found if _VERSION.fullmatch(path.name)]
    return max(versions, key=lambda path: [int(n) for n in path.name.split(".")], default=None)


def find_name(name: str, place: pathlib.Path) -> pathlib.Path | None:
    """Returns the prepared version of NAME, NAME/CONFIG or either with :VERSION under `place`."""
    return find(place / name.replace(":", "/")) if _NAME.fullmatch(name) else None


def names_in(place: pathlib.Path) -> list[str]:
    """The names, or configurations, of the data sets that lie one level deeper in `place`."""
    return sorted({info.parents[1].name for info in place.glob(f"*/*/{_INFO}")})


def how_to_make(name: str, place: pathlib.Path) -> str:
    """What to run so that TFDS prepares `name` under `place`; '' for names not known here."""
    if name not in _BY_HAND and name not in _FETCHED:
        return ""
    builder = f"tfds.builder('{name}', data_dir='{place}', file_format='array_record')"
    files, options = "", ""
    if name in _BY_HAND:
        files = f"put {_BY_HAND[name]} into FOLDER, "
        options = "download_config=tfds.download.DownloadConfig(manual_dir='FOLDER')"
    return (
        f"{files}run make setup EXTRAS=prepare and then "
        '.venv/bin/python -c "import tensorflow_datasets as tfds; '
        f'{builder}.download_and_prepare({options})"'
    )


# What is in them.


def open_version(folder: pathlib.Path, split: str, labelled: bool = True) -> Pictures:
    """Opens one split of a prepared version: its one image, encoded, and its one class label.

    Records are named by their place, so that none is read here. `labelled=False` leaves labels out.

    Raises:
      UserError: another file format, no such split, not one image, several labels, missing files;
        on reading, a record that is damaged or has no label (as those of ImageNet's test split).
    """
    info, records = open_records(folder, split)
    image, label_name = _features(folder, info.features, labelled)

    def name(index: int) -> str:
        return f"{split}[{index}]"

    def read(index: int) -> tuple[bytes, int]:
        try:
            record = records[index]
        except Exception as error:  # array_record and protobuf raise errors of many kinds
            raise UserError(f"{folder}/{name(index)} cannot be read: {_line(error)}") from error
        label = int(record[label_name]) if label_name else 0
        if label < 0:
            raise UserError(f"{folder}/{name(index)} has no label: take another split")
        return record[image], label

    num_classes = info.features[label_name].num_classes if label_name else 0
    names = info.features[label_name].names if num_classes else ()
    parts = sorted((part.name, part.num_examples, part.num_bytes) for part in info.splits.values())
    content = (info.full_name, split, len(records), num_classes, *parts)
    return Pictures(
        where=str(folder),
        keys=np.array([key(name(index)) for index in range(len(records))], np.uint64),
        name=name,
        read=read,
        num_classes=num_classes,
        fingerprint=fingerprint(" ".join(map(str, content))),
        classes=readable(names),
    )


def open_records(folder: pathlib.Path, split: str, decode: bool = False) -> tuple[Any, Any]:
    """Returns the DatasetInfo of a prepared version, and a split's records at random access.

    A record is {feature: value}; images are encoded bytes, or arrays with `decode`. It may be read
    from several threads.

    Raises:
      UserError: no TFDS data, another file format, no such split, or missing files.
    """
    import tensorflow_datasets as tfds

    _check_classes(folder)
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # of JSON, of protocol buffers, of TFDS itself
        raise UserError(f"{folder} is no TFDS data that can be read: {_line(error)}") from error
    images = [n for n, f in builder.info.features.items() if isinstance(f, tfds.features.Image)]
    decoders = {} if decode else {name: tfds.decode.SkipDecoding() for name in images}
    try:
        records = builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise UserError(
            f"{folder} is {builder.info.file_format.value}, which cannot be read at random: "
            f"convert it with python scripts/convert_tfds.py --folder={folder}"
        ) from error
    except ValueError as error:
        splits = ", ".join(sorted(builder.info.splits))
        raise UserError(f"{folder} has no split {split}: there are {splits}") from error
    files = [part.filename for part in builder.info.splits[split].file_instructions]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        count = f"{len(missing)} of its {len(files)} files"
        raise UserError(f"{folder} lacks {count} of {split}, as {os.path.basename(missing[0])}")
    return builder.info, records


def _check_classes(folder: pathlib.Path) -> None:
    """Looks at features.json, which names classes: TFDS imports whatever module it says.

    Raises:
      UserError: a class that is not TFDS's own.
    """
    path = folder / "features.json"
    if not path.is_file():
        return  # TFDS says so
    try:
        named = _classes(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({_line(error)}): fetch it again") from error
    for name in named:
        if not re.fullmatch(_OWN + r"[\w.]+", name):
            raise UserError(f"{path} names {name!r}, which is no class of TFDS: prepare it anew")


def _classes(value: Any) -> list[str]:
    """The classes that features as JSON name, at any depth."""
    if isinstance(value, list):
        return [name for item in value for name in _classes(item)]
    if not isinstance(value, dict):
        return []
    own = [v for k, v in value.items() if k in _CLASS_KEYS and isinstance(v, str)]
    return own + [name for item in value.values() for name in _classes(item)]


def _features(folder: pathlib.Path, features: Any, labelled: bool) -> tuple[str, str]:
    """Returns the names of the one image and of the one class label, '' where there is none."""
    import tensorflow_datasets as tfds

    def one(kind: type, what: str) -> str:
        names = [name for name, feature in features.items() if isinstance(feature, kind)]
        if len(names) > 1:
            raise UserError(f"{folder} has more than one {what}: {', '.join(names)}")
        return "".join(names)

    image = one(tfds.features.Image, "image")
    if not image:
        raise UserError(f"{folder} has no images, but {', '.join(features)}")
    return image, one(tfds.features.ClassLabel, "class label") if labelled else ""


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
