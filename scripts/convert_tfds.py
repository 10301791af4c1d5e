"""Converts a data set that TFDS prepared as tfrecord to array_record, beside it, in as much space.

  python scripts/convert_tfds.py --folder=~/tensorflow_datasets/imagenet2012/5.1.0

It needs no TensorFlow. TFDS's own `tfds convert_format` does the same, but loads Apache Beam, no
version of which fits the packages pinned here. Interrupted, it goes on where it was; once it is
done, nothing here reads the tfrecord files again.
"""

import json
import os
import pathlib
import struct
import sys
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from absl import flags

from utils import cli

FOLDER = flags.DEFINE_string("folder", "", "The version's folder, with dataset_info.json.")


def main(_) -> None:
    """Tfrecord shards → array_record shards, and then dataset_info.json, which names the format."""
    if not FOLDER.value:
        raise cli.UserError("which data set? --folder=.../imagenet2012/5.1.0")
    convert(pathlib.Path(FOLDER.value).expanduser())


def convert(folder: pathlib.Path) -> None:
    """Writes every shard of every split of a prepared version once more, as array_record.

    Raises:
      UserError: no such data, or a shard that is cut short or has another number of records.
    """
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    try:
        splits = tfds.builder_from_directory(folder).info.splits.values()
    except Exception as error:  # of JSON, of protocol buffers, of TFDS itself
        raise cli.UserError(f"{folder} is no TFDS data: {error}") from error
    todo = []
    for split in splits:
        old = split.filename_template.replace(filetype_suffix="tfrecord")
        new = split.filename_template.replace(filetype_suffix="array_record")
        for index, count in enumerate(split.shard_lengths):
            place = {"shard_index": index, "num_shards": len(split.shard_lengths)}
            paths = (template.sharded_filepath(**place) for template in (old, new))
            source, target = map(pathlib.Path, paths)
            if target.resolve().parent != folder.resolve():
                raise cli.UserError(f"{folder} names files outside of it: prepare it anew")
            todo.append((source, target, count))
    for source, target, count in tqdm(todo, unit="shard", disable=None):
        if not target.exists():
            _convert_shard(source, target, count)
    info = folder / "dataset_info.json"
    card = json.loads(info.read_text())
    formats = card.setdefault("alternativeFileFormats", [])
    if "array_record" not in (*formats, card.get("fileFormat")):
        formats.append("array_record")
        beside = info.with_suffix(".unfinished")
        beside.write_text(json.dumps(card, indent=2))
        os.replace(beside, info)


def _convert_shard(source: pathlib.Path, target: pathlib.Path, count: int) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    beside = target.with_name(f"{target.name}.unfinished")
    writer = ArrayRecordWriter(str(beside), "group_size:1")  # one by one, for access at random
    found = 0
    for record in _records(source):
        writer.write(record)
        found += 1
    writer.close()
    if found != count:
        raise cli.UserError(f"{source} has {found} records, not the {count} that it should have")
    os.replace(beside, target)


def _records(path: pathlib.Path) -> Iterator[bytes]:
    """Yields the records of a tfrecord file: length, its checksum, content, its checksum.

    The format: https://www.tensorflow.org/tutorials/load_data/tfrecord. Checksums (CRC-32C) are not
    compared, since Python has none that is fast; a flipped bit shows when its picture is decoded.
    """
    with path.open("rb") as file:
        while header := file.read(12):
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
            record = file.read(length + 4)
            if len(header) < 12 or len(record) < length + 4:
                raise cli.UserError(f"{path} is cut short: fetch or prepare it again")
            yield record[:-4]


if __name__ == "__main__":
    cli.run(main)
