"""Prepared folders: what is written comes back, from any thread, and damage is told in a line."""

import dataclasses
import json
import pathlib
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from utils import shards
from utils.cli import UserError

COUNT, SIZE, SHAPE = 23, 8, (2, 2, 4)


def moments(flipped: bool = True) -> np.ndarray:
    """Random moments (COUNT, sides, h, w, c), float16."""
    draws = np.random.default_rng(0).standard_normal((COUNT, 1 + flipped, *SHAPE))
    return draws.astype(np.float16)


def write(folder: pathlib.Path, dtype: str = "float16", flipped: bool = True) -> shards.Card:
    """A complete folder of moments, whose keys are 1000 and up and whose labels go round to 5."""
    card = shards.Card(
        kind="moments",
        dataset_name="folder",
        source={"source": "pictures", "data_dir": "", "split": "train"},
        source_fingerprint="0123456789ab",
        source_count=COUNT,
        num_classes=5,
        image_size=16,
        crop=shards.CROP,
        autoencoder={"name": "tiny", "fingerprint": "ba9876543210", "compute_dtype": "float32"},
        dtype=dtype,
        shape=SHAPE,
        flipped=flipped,
        shard_size=SIZE,
        shards=3,
        versions={"jax": "0"},
    )
    folder.mkdir(exist_ok=True)
    shards.write_card(folder, card)
    key, label = np.arange(1000, 1000 + COUNT), np.arange(COUNT) % 5
    for k in range(card.shards):
        part = slice(k * SIZE, k * SIZE + card.expected(k))
        records = shards.pack(card.record, key[part], label[part], moments(flipped)[part])
        shards.write_shard(shards.shard_path(folder, card, k), records)
    index = np.zeros(COUNT, shards.INDEX)
    index["key"], index["label"] = key, label
    shards.write_index(folder, index)
    card = dataclasses.replace(card, complete=True, count=COUNT, mean=(0.5,), content="ab" * 6)
    shards.write_card(folder, card)
    return card


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_moments_come_back_as_they_were_written(tmp_path, dtype):
    card = write(tmp_path, dtype)
    source = shards.MomentsSource(tmp_path)
    assert source.card == card and len(source) == COUNT
    np.testing.assert_array_equal(source.keys, np.arange(1000, 1000 + COUNT))
    wanted = moments().astype(shards.DTYPES[dtype])
    order = np.random.default_rng(1).integers(COUNT, size=60)  # with repetitions
    for mirrored in (None, order % 2 == 0):
        batch = source.gather(order, mirrored)
        side = np.zeros(60, int) if mirrored is None else mirrored.astype(int)
        assert batch["x"].dtype == shards.DTYPES[dtype] and batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["x"], wanted[order, side])
        np.testing.assert_array_equal(batch["label"], order % 5)
    item = source[7]
    assert item["label"] == 2 and (item["x"] == wanted[7, 0]).all()
    assert source.gather([])["x"].shape == (0, *SHAPE)


def test_records_are_packed_as_documented(tmp_path):
    card = write(tmp_path)
    shard = shards.Shard(shards.shard_path(tmp_path, card, 1))
    record = b"".join(shard.read([3]))
    assert record[:12] == (1011).to_bytes(8, "little") + (11 % 5).to_bytes(4, "little")
    assert record[12:] == moments()[11].astype("<f2").tobytes()
    assert sum(len(chunk) for chunk in shard.chunks(3)) == len(shard) == SIZE


def test_a_part_of_the_items_has_the_order_asked_for(tmp_path):
    write(tmp_path)
    source = shards.MomentsSource(tmp_path)
    part = source.subset(np.array([20, 3, 11])).subset(np.array([2, 0]))
    np.testing.assert_array_equal(part.keys, [1011, 1020])
    np.testing.assert_array_equal(part.gather([1, 0])["x"], moments()[[20, 11], 0])
    again = shards.MomentsSource(tmp_path, np.array([11, 20]))
    np.testing.assert_array_equal(again.gather([0, 1])["x"], part.gather([0, 1])["x"])


def test_many_threads_read_the_same_source(tmp_path):
    write(tmp_path)
    source, wanted = shards.MomentsSource(tmp_path), moments()[:, 0]

    def read(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(COUNT)
        return bool((source.gather(order)["x"] == wanted[order]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))


def test_pictures_come_back_as_they_were_written(tmp_path):
    card = dataclasses.replace(write(tmp_path), kind="pictures", dtype="uint8")
    encoded = [bytes([i]) * (i * 100) for i in range(COUNT)]  # of any length, the first empty
    for k in range(card.shards):
        rows = range(k * SIZE, k * SIZE + card.expected(k))
        records = [shards.pack_picture(1000 + i, i % 5, encoded[i]) for i in rows]
        shards.write_shard(shards.shard_path(tmp_path, card, k), records)
    shards.write_card(tmp_path, card)
    pictures = shards.open_shards(tmp_path, "folder")
    assert [pictures.read(i) for i in range(COUNT)] == [(encoded[i], i % 5) for i in range(COUNT)]
    assert (pictures.num_classes, pictures.size) == (5, 16)
    assert pictures.fingerprint == card.source_fingerprint
    np.testing.assert_array_equal(pictures.keys, np.arange(1000, 1000 + COUNT))
    with pytest.raises(UserError, match="holds pictures, not"):
        shards.MomentsSource(tmp_path)


def test_shards_are_powers_of_two_and_at_most_512():
    sizes = {n: shards.shard_size_for(n) for n in (1, 400, 30_000, 2**15 + 1, 1_281_167, 10**8)}
    assert sizes[1] == sizes[400] == sizes[30_000] == 64
    assert sizes[2**15 + 1] == 128 and sizes[1_281_167] == 4096
    assert all(size & (size - 1) == 0 and n <= 512 * size for n, size in sizes.items())


# Mistakes and damage.


def complaint(call, *args) -> str:
    """The one line that `call` ends in."""
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_wrong_folder_is_told(tmp_path):
    assert "has no card.json: give a folder that" in complaint(shards.read_card, tmp_path)
    assert "is not there: give" in complaint(shards.read_card, tmp_path / "nowhere")
    (tmp_path / "card.json").write_text('{"format": 2}')
    assert "is of another format" in complaint(shards.read_card, tmp_path)
    for text in ("{", "[]", '{"format": 1}', '{"format": 1, "colour": "red"}', "{}"):
        (tmp_path / "card.json").write_text(text)
        assert "is no card" in complaint(shards.read_card, tmp_path)


def test_an_unfinished_folder_is_told(tmp_path):
    card = write(tmp_path)
    shards.write_card(tmp_path, dataclasses.replace(card, complete=False))
    shards.shard_path(tmp_path, card, 1).unlink()
    assert "2 of 3 shards are there: run the same" in complaint(shards.MomentsSource, tmp_path)
    assert shards.missing_shards(tmp_path, card) == [1]
    assert shards.read_card(tmp_path, complete=False).source_count == COUNT


def test_missing_and_cut_shards_are_told_at_once(tmp_path):
    card = write(tmp_path)
    path = shards.shard_path(tmp_path, card, 2)
    content = path.read_bytes()
    for bad in (b"", content[:100], content[:-1], bytes(len(content))):
        path.write_bytes(bad)
        assert f"{path} is damaged" in complaint(shards.MomentsSource, tmp_path)
    path.unlink()
    assert f"{path} is missing" in complaint(shards.MomentsSource, tmp_path)
    shards.write_shard(path, [b"too few"])
    assert "has 17 records where its card says 23" in complaint(shards.MomentsSource, tmp_path)
    (tmp_path / "index.npy").write_bytes(b"")
    assert "index.npy cannot be read" in complaint(shards.MomentsSource, tmp_path)


def test_a_flipped_bit_is_found(tmp_path):
    card = write(tmp_path)
    path = shards.shard_path(tmp_path, card, 0)
    content = bytearray(path.read_bytes())
    content[content.index(moments()[5].tobytes())] ^= 1
    path.write_bytes(content)
    source = shards.MomentsSource(tmp_path)
    assert len(source.gather(range(6, COUNT))["x"]) == COUNT - 6  # the others can be read
    assert f"{path} is damaged" in complaint(source.gather, [5])


def test_mirrored_moments_must_be_there(tmp_path):
    write(tmp_path, flipped=False)
    source = shards.MomentsSource(tmp_path)
    np.testing.assert_array_equal(source.gather([4])["x"], moments(flipped=False)[[4], 0])
    assert "has no mirrored moments" in complaint(source.gather, [0], np.array([True]))


def test_a_shard_that_does_not_fit_the_disk_is_not_there(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "shard-00000-of-00001.array_record"
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        line = complaint(shards.write_shard, path, [bytes(50_000)] * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in line and "File too large" in line
    assert list(tmp_path.iterdir()) == []


def test_only_old_leftovers_are_removed(tmp_path):
    card = write(tmp_path)
    left = tmp_path / ".card.json.00000000.part"
    left.write_text(json.dumps({}))
    shards.remove_leftovers(tmp_path)
    assert left.exists()
    shards.remove_leftovers(tmp_path, older_than=-1)
    assert not left.exists() and shards.missing_shards(tmp_path, card) == []
