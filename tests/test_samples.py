"""Pictures as other tools exchange them: what is written comes back, whole or not at all."""

import io
import os
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from utils import samples, shards
from utils.cli import UserError
from utils.samples import NpzFile, PngFolder, open_samples
from utils.sources import centre_crop

ROOT = pathlib.Path(__file__).parents[1]
COUNT, SHAPE = 11, (6, 9, 3)


def noise(count: int = COUNT, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """Random pictures, uint8 (count, *shape)."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_files(folder: pathlib.Path, pictures: np.ndarray) -> pathlib.Path:
    """Picture files, some loose and some in folders, whose sorted names keep the order."""
    for k, x in enumerate(pictures):
        path = folder / (f"{k:02d}.png" if k % 2 else f"{k:02d}/picture.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.squeeze()).save(path)
    return folder


def zipped(folder: pathlib.Path) -> pathlib.Path:
    """The .zip of a folder, around which it has another one."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, f"around/{file.relative_to(folder).as_posix()}")
    return path


def check(opened: samples.Samples, wanted: np.ndarray) -> None:
    """Every way to the pictures gives the `wanted`, (n, H, W, 3)."""
    source = opened.source
    assert opened.shape == wanted.shape[1:] and len(source) == len(wanted)
    order = np.array([3, 0, 3, len(wanted) - 1])
    batch = source.gather(order)
    assert batch["x"].dtype == np.uint8 and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["x"], wanted[order])
    assert not batch["label"].any()
    mirrored = np.array([True, False, False, True])
    turned = source.gather(order, mirrored)["x"]
    np.testing.assert_array_equal(turned[mirrored], wanted[order][mirrored][:, :, ::-1])
    np.testing.assert_array_equal(turned[~mirrored], wanted[order][~mirrored])
    np.testing.assert_array_equal(source.gather(order)["x"], wanted[order])  # none was changed
    np.testing.assert_array_equal(source[2]["x"], wanted[2])
    assert source[2]["label"] == 0 and source.gather([])["x"].shape == (0, *wanted.shape[1:])


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_come_as_they_are(tmp_path, kind, channels):
    """Not cropped to a square, grey as RGB, and whatever their folders mean."""
    pictures = noise()[..., :channels]
    place = write_files(tmp_path / "files", pictures)
    opened = open_samples(zipped(place) if kind == "zip" else place)
    check(opened, np.broadcast_to(pictures, (COUNT, *SHAPE)))
    assert opened.words.startswith("11 pictures of 9 × 6 pixels in ")


def test_files_are_cropped_where_a_size_is_given(tmp_path):
    for k in range(4):
        x = noise(1, (40 + 7 * k, 50, 3), seed=k)[0]
        Image.fromarray(x).save(tmp_path / f"{k}.png")
    opened = open_samples(tmp_path, 16)
    wanted = [centre_crop(Image.open(tmp_path / f"{k}.png"), 16) for k in range(4)]
    check(opened, np.stack([np.asarray(picture) for picture in wanted]))
    assert opened.words.endswith(", ADM centre crop") and "of 16 × 16" in opened.words
    assert len({opened.fingerprint, *(open_samples(tmp_path, s).fingerprint for s in (8, 9))}) == 3


def test_what_prepare_data_wrote_comes_back_in_its_order(tmp_path):
    """Whatever data set's labels it was prepared with."""
    pictures, folder = noise(7, (8, 8, 3)), tmp_path / "prepared"
    folder.mkdir()
    card = shards.Card(
        kind="pictures",
        dataset_name="imagenet256",
        source={"source": "somewhere", "data_dir": "", "split": "train"},
        source_fingerprint="0123456789ab",
        source_count=7,
        num_classes=1000,
        image_size=8,
        crop=shards.CROP,
        autoencoder=None,
        dtype="uint8",
        shape=(8, 8, 3),
        flipped=False,
        shard_size=64,
        shards=1,
        versions={},
        complete=True,
        count=7,
    )
    encoded = []
    for k, x in enumerate(pictures):
        file = io.BytesIO()
        Image.fromarray(x).save(file, format="png")
        encoded.append(shards.pack_picture(k, 5, file.getvalue()))
    shards.write_card(folder, card)
    shards.write_shard(shards.shard_path(folder, card, 0), encoded)
    shards.write_index(folder, shards.heads(encoded))
    check(open_samples(folder), pictures)
    check(open_samples(folder, 8), pictures)
    assert open_samples(folder).fingerprint == open_samples(folder, 8).fingerprint
    with pytest.raises(UserError, match="prepared at 8 pixels, not 16"):
        open_samples(folder, 16)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [SHAPE, (6, 9, 1)])
def test_arrays_come_as_they_are(tmp_path, save, order, shape):
    pictures = noise(shape=shape)
    array = np.asarray(pictures, order=order)
    path = tmp_path / "samples.npz"
    save(path, array, np.arange(COUNT))  # arr_0, and labels arr_1
    opened = open_samples(path)
    check(opened, np.broadcast_to(pictures, (COUNT, *SHAPE)))
    path.rename(tmp_path / "samples.zip")
    again = open_samples(tmp_path / "samples.zip")
    check(again, np.broadcast_to(pictures, (COUNT, *SHAPE)))
    assert again.fingerprint == opened.fingerprint


def test_an_array_of_the_size_asked_for_is_taken(tmp_path):
    np.savez(tmp_path / "a.npz", noise(shape=(8, 8, 3)))
    check(open_samples(tmp_path / "a.npz", 8), noise(shape=(8, 8, 3)))


def test_a_fingerprint_follows_the_pictures_alone(tmp_path):
    changed = noise()
    changed[5, 2, 2, 1] ^= 1
    names = set()
    for k, pictures in enumerate((noise(), noise(), changed, noise()[:-1])):
        np.savez(tmp_path / f"{k}.npz", pictures)
        names.add(open_samples(tmp_path / f"{k}.npz").fingerprint)
    assert len(names) == 3
    folder = write_files(tmp_path / "files", noise())
    assert open_samples(folder).fingerprint == open_samples(zipped(folder)).fingerprint


# Mistakes


def test_pictures_of_several_sizes_are_told_with_the_mend(tmp_path):
    for k, side in enumerate([8, 8, 10]):
        Image.fromarray(noise(1, (side, 8, 3))[0]).save(tmp_path / f"{k}.png")
    source = open_samples(tmp_path).source
    assert source.gather([0, 1])["x"].shape == (2, 8, 8, 3)
    with pytest.raises(UserError, match=r"2\.png has 8 × 10 .*0\.png 8 × 8: .*--image_size=SIZE"):
        source.gather([1, 2])


@pytest.mark.parametrize("bad", [0, 2])
def test_a_corrupt_picture_is_named(tmp_path, bad):
    write_files(tmp_path / "files", noise(4))
    name = sorted(p for p in (tmp_path / "files").rglob("*.png"))[bad]
    name.write_bytes(name.read_bytes()[:60])
    with pytest.raises(UserError, match=f"{name.name} is no readable picture.*: make it again"):
        open_samples(tmp_path / "files").source.gather(range(4))


class Evil:
    """Its unpickling would leave a file."""

    def __reduce__(self):
        return (os.mkdir, ("evil",))


def damaged(path: pathlib.Path, change: str) -> None:
    """An .npz with `arr_0` of the wrong kind, or broken."""
    good = noise(shape=(8, 8, 3))
    arrays = {
        "statistics": {"mu": np.zeros(3), "sigma": np.eye(3)},
        "empty": {},
        "float": {"arr_0": good / np.float32(255)},
        "channels first": {"arr_0": good.transpose(0, 3, 1, 2)},
        "one picture": {"arr_0": good[0]},
        "no pictures": {"arr_0": good[:0]},
        "numbers": {"arr_0": good.reshape(-1)},
        "pickled": {"arr_0": np.array([Evil()])},
    }
    np.savez(path, **arrays.get(change, {"arr_0": good}))
    whole = path.read_bytes()
    if change == "cut":
        path.write_bytes(whole[:-100])
    if change == "no zip":
        path.write_bytes(b"not an archive")
    if change in ("header", "magic"):
        old, new = {"header": (b"(11, 8", b"(12, 8"), "magic": (b"NUMPY", b"NUMPI")}[change]
        with zipfile.ZipFile(path) as archive:
            content = archive.read("arr_0.npy")
        assert content.count(old) == 1
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", content.replace(old, new))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("statistics", "holds no pictures, arr_0, but mu, sigma: statistics can only be"),
        ("empty", "but nothing"),
        ("float", r"is float32 \(11, 8, 8, 3\): give pictures as uint8 \(n, H, W, 3\)"),
        ("channels first", r"is uint8 \(11, 3, 8, 8\)"),
        ("one picture", r"is uint8 \(8, 8, 3\)"),
        ("no pictures", r"is uint8 \(0, 8, 8, 3\)"),
        ("numbers", r"is uint8 \(2112,\)"),
        ("pickled", "Object arrays cannot be loaded"),
        ("cut", "cannot be read"),
        ("no zip", "cannot be read"),
        ("header", "not as long as its header says"),
        ("magic", "cannot be read"),
        ("size", "of 8 × 8 pixels, not 16 × 16: leave --image_size out"),
    ],
)
def test_other_arrays_are_told_in_a_line(tmp_path, monkeypatch, change, told):
    monkeypatch.chdir(tmp_path)
    damaged(tmp_path / "a.npz", change)
    with pytest.raises(UserError, match=told) as error:
        open_samples(tmp_path / "a.npz", 16 if change == "size" else 0)
    assert "a.npz" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "evil").exists()


def test_other_places_are_told_in_a_line(tmp_path):
    with pytest.raises(UserError, match="is not there: give a folder or"):
        open_samples(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no pictures"):
        open_samples(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"a\.zip is no whole \.zip"):
        open_samples(tmp_path / "a.zip")


# Writers


def writer(kind: str, path: pathlib.Path, shape: tuple[int, int, int] = SHAPE) -> samples._Writer:
    """A writer of COUNT pictures, of either kind."""
    return PngFolder(path, COUNT) if kind == "png" else NpzFile(path, COUNT, shape)


def write(kind: str, path: pathlib.Path, pictures: np.ndarray, batch: int = 4) -> None:
    """Writes `pictures` in batches."""
    with writer(kind, path, pictures.shape[1:]) as out:
        for start in range(0, len(pictures), batch):
            out.add(pictures[start : start + batch])


@pytest.mark.parametrize("kind", ["png", "npz"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_comes_back(tmp_path, kind, channels):
    pictures = noise()[..., :channels]
    for batch in (1, 4, COUNT):
        write(kind, tmp_path / "new" / f"{batch}", pictures, batch)
    opened = [open_samples(tmp_path / "new" / f"{batch}") for batch in (1, 4, COUNT)]
    for one in opened:
        check(one, np.broadcast_to(pictures, (COUNT, *SHAPE)))
    assert len({one.fingerprint for one in opened}) == 1
    assert sorted(os.listdir(tmp_path / "new")) == ["1", "11", "4"]


def test_the_array_is_as_other_tools_read_it(tmp_path):
    path = tmp_path / "samples.npz"
    write("npz", path, noise())
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0"]
        np.testing.assert_array_equal(arrays["arr_0"], noise())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED
    first = path.read_bytes()
    write("npz", path, noise(), batch=3)
    assert path.read_bytes() == first


def test_a_stored_array_is_not_read_into_memory(tmp_path):
    write("npz", tmp_path / "samples.npz", noise())
    source = open_samples(tmp_path / "samples.npz").source
    whole = (tmp_path / "samples.npz").read_bytes()
    (tmp_path / "samples.npz").write_bytes(whole[: len(whole) // 2])
    np.testing.assert_array_equal(source.gather([-COUNT, 0])["x"], noise()[[0, 0]])
    with pytest.raises(UserError, match="cut short"):
        source.gather([COUNT - 1])
    with pytest.raises(IndexError):
        source.gather([COUNT])


def test_files_are_numbered_and_of_their_own_channels(tmp_path):
    write("png", tmp_path / "out", noise()[..., :1])
    assert sorted(os.listdir(tmp_path / "out")) == [f"{k:06d}.png" for k in range(COUNT)]
    picture = Image.open(tmp_path / "out" / "000010.png")
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), noise()[10, ..., 0])


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_all_or_nothing(tmp_path, kind):
    path = tmp_path / "out"
    with writer(kind, path) as out:
        out.add(noise(9))
        assert not path.exists()
        out.add(noise(0))
        with pytest.raises(ValueError, match="more than 11"):
            out.add(noise(3))
        out.add(noise(2))
    check(open_samples(path), np.concatenate([noise(9), noise(2)]))
    before = open_samples(path).fingerprint
    with pytest.raises(KeyError), writer(kind, path) as out:
        out.add(noise(9, seed=1))
        raise KeyError
    with pytest.raises(ValueError, match="10 pictures of 11"), writer(kind, path) as out:
        out.add(noise(10, seed=1))
    assert os.listdir(tmp_path) == ["out"] and open_samples(path).fingerprint == before
    write(kind, path, noise(seed=1))
    check(open_samples(path), noise(seed=1))
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["png", "npz"])
@pytest.mark.parametrize(
    "wrong", [noise() / 255, noise()[0], noise(2, (6, 9, 4)), noise(2, (6, 9, 2))]
)
def test_other_arrays_are_not_written(tmp_path, kind, wrong):
    with pytest.raises(ValueError, match=r"uint8 \(n, H, W, 1 or 3\)"):
        write(kind, tmp_path / "out", wrong)
    assert os.listdir(tmp_path) == []


def test_an_array_has_pictures_of_one_shape(tmp_path):
    with pytest.raises(ValueError, match="not"), writer("npz", tmp_path / "out") as out:
        out.add(noise(COUNT, (6, 9, 1)))


def test_nobodys_own_files_are_replaced(tmp_path):
    folder, mine = tmp_path / "mine", tmp_path / "mine" / "000000.txt"
    folder.mkdir()
    mine.touch()
    for place in (folder, mine):
        with pytest.raises(UserError, match="not a folder of samples alone"):
            write("png", place, noise())
    with pytest.raises(UserError, match="is a folder: name a file"):
        write("npz", folder, noise())
    assert os.listdir(folder) == ["000000.txt"] and os.listdir(tmp_path) == ["mine"]


def test_what_a_killed_writer_left_goes_when_it_is_old(tmp_path):
    for kind, age in (("png", 0), ("npz", 0), ("png", 7200), ("npz", 7200)):
        out = writer(kind, tmp_path / f"{kind}{age}")
        out.__enter__()
        out.add(noise(2))
        past = out._part.stat().st_mtime - age
        os.utime(out._part, (past, past))
    write("npz", tmp_path / "out", noise())
    left = sorted(name.split(".")[1] for name in os.listdir(tmp_path) if name.startswith("."))
    assert left == ["npz0", "png0"]


MEMORY = """
import sys, numpy as np, psutil
from utils.samples import NpzFile, open_samples
path, total, batch = sys.argv[1], 3000, 50
pictures = np.random.default_rng(0).integers(0, 256, (batch, 256, 256, 3), dtype=np.uint8)
own = lambda: psutil.Process().memory_info().rss / 1e6
with NpzFile(path, total, (256, 256, 3)) as out:
    used = []
    for _ in range(total // batch):
        out.add(pictures)
        used.append(own())
source = open_samples(path).source
for start in range(0, total, batch):
    x = source.gather(np.arange(start, start + batch))["x"]
    assert (x[7] == pictures[7]).all()
    used.append(own())
print(max(used) - used[2])
"""


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    """590 MB are written and read through at most 40 MB."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "samples.npz")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 40


def test_other_pictures_of_the_same_names_and_sizes_have_another_fingerprint(tmp_path):
    names = []
    for value in (10, 200):
        for number in range(3):
            picture = Image.fromarray(np.full((8, 8, 3), value + number, np.uint8))
            picture.save(tmp_path / f"{number}.bmp")  # of one size in bytes, whatever is in it
        names.append(open_samples(tmp_path).fingerprint)
    assert len(set(names)) == 2
