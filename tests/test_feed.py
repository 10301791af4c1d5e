"""Where the items are kept changes no batch."""

import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils import feed
from utils.cli import UserError
from utils.sharding import batch_sharding, make_mesh
from utils.sources import ArraySource

N = 37  # no multiple of any number of devices


class TwoSided:
    """Stands for moments on disk: the mirrored side is no mirror image of the other."""

    sides = 2

    def __init__(self, dtype):
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(N, 2, 4, 4, 6)).astype(dtype)
        self.label = np.arange(N, dtype=np.int32)

    def __len__(self):
        return N

    def __getitem__(self, index):
        return {"x": self.x[index, 0], "label": int(self.label[index])}

    def gather(self, indices, mirrored=None):
        side = np.zeros(len(indices), int) if mirrored is None else np.asarray(mirrored, int)
        return {"x": self.x[np.asarray(indices), side], "label": self.label[indices]}


def pixels() -> ArraySource:
    rng = np.random.default_rng(1)
    return ArraySource(rng.integers(256, size=(N, 6, 5, 3), dtype=np.uint8), np.arange(N) % 7)


SOURCES = {
    "pixels": pixels,
    "float16": lambda: TwoSided(np.float16),
    "bfloat16": lambda: TwoSided(jnp.bfloat16),
}


def take(source, cache: str, devices: int, *, flip: bool, start: int = 0, fsdp: int = 1) -> list:
    mesh = make_mesh(-1, fsdp, jax.devices()[:devices])
    batches = feed.feed(source, mesh, cache=cache, batch_size=16, seed=3, flip=flip)
    taken = list(itertools.islice(batches(start), 5 - start))
    for array in jax.tree.leaves(taken):
        assert array.sharding.is_equivalent_to(batch_sharding(mesh), array.ndim)
    return jax.device_get(taken)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", SOURCES)
def test_batches_do_not_depend_on_the_cache_or_the_devices(name, flip):
    source = SOURCES[name]()
    expected = take(source, "disk", 1, flip=flip)
    assert expected[0]["x"].dtype == source[0]["x"].dtype
    for cache, devices in [("host", 1), ("device", 1), ("device", 8)]:
        fsdp = 2 if devices == 8 else 1
        for a, b in zip(expected, take(source, cache, devices, flip=flip, fsdp=fsdp), strict=True):
            assert a.keys() == b.keys() == {"x", "label", "position"}
            for key in a:
                np.testing.assert_array_equal(a[key], b[key], err_msg=f"{cache} {key}")
                assert a[key].dtype == b[key].dtype


def test_large_caches_are_filled_in_chunks(monkeypatch):
    monkeypatch.setattr(feed, "CHUNK", 3)
    expected = take(pixels(), "disk", 1, flip=True)
    for a, b in zip(expected, take(pixels(), "device", 8, flip=True), strict=True):
        np.testing.assert_array_equal(a["x"], b["x"])
        np.testing.assert_array_equal(a["label"], b["label"])


@pytest.mark.parametrize("cache", feed.CACHES)
def test_a_later_start_goes_on_where_the_batches_were(cache):
    whole = take(pixels(), cache, 8, flip=True)
    for a, b in zip(whole[2:], take(pixels(), cache, 8, flip=True, start=2), strict=True):
        np.testing.assert_array_equal(a["x"], b["x"])


def test_about_half_are_mirrored():
    plain, flipped = (take(TwoSided(np.float16), "device", 8, flip=f) for f in (False, True))
    same = [(a["x"] == b["x"]).all((1, 2, 3)) for a, b in zip(plain, flipped, strict=True)]
    assert 0.25 < np.mean(same) < 0.75


def test_a_device_holds_its_share_alone():
    """No gathering of all items on any device: the compiled lookup moves a batch, not the data."""
    mesh = make_mesh()
    big = ArraySource(np.zeros((4096, 4, 4, 2), np.float16), np.zeros(4096, np.int32))
    lookup = feed.on_devices(big, mesh, False)
    items = lookup.args[0]
    assert {shard.data.shape[0] for shard in items["x"].addressable_shards} == {4096 // 8}
    batch = {
        "row": jax.device_put(np.arange(16, dtype=np.int32), batch_sharding(mesh)),
        "mirrored": jax.device_put(np.zeros(16, bool), batch_sharding(mesh)),
        "position": jax.device_put(np.arange(16, dtype=np.int32), batch_sharding(mesh)),
    }
    memory = lookup.func.lower(items, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < items["x"].nbytes / 8


class Device:
    """A device that tells its memory."""

    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return {"bytes_limit": self.limit, "bytes_in_use": 0}


class Mesh:
    local_devices: ClassVar = [Device(1000)]
    size = 1


def test_what_does_not_fit_is_told_in_one_line(monkeypatch):
    with pytest.raises(UserError, match="cache='ram': one of disk, host, device"):
        take(pixels(), "ram", 1, flip=False)
    with pytest.raises(UserError, match=r"cache=device needs .* give --cache=host or --cache=disk"):
        feed.on_devices(pixels(), Mesh(), flip=False)
    monkeypatch.setattr(feed, "_free_memory", lambda: 10)
    with pytest.raises(UserError, match=r"cache=host needs .* give --cache=disk"):
        feed.in_memory(TwoSided(np.float16), flip=True)
    with pytest.raises(UserError, match=r"cache=device needs .* give --cache=host or --cache=disk"):
        feed.on_devices(pixels(), make_mesh(), flip=False)  # of CPUs
    empty = ArraySource(np.zeros((0, 2, 2, 1), np.uint8), np.zeros(0, np.int32))
    with pytest.raises(UserError, match="no items"):
        feed.on_devices(empty, make_mesh(), flip=False)
