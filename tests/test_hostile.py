"""Files from strangers: they run no code, write nowhere, take no memory, and are told in one line.

The files are real: pickles that would leave a canary, bombs of 10 GB in some MB, headers that lie,
names and links that lead out of their folder.
"""

import dataclasses
import io
import json
import math
import os
import pathlib
import pickle
import stat
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
from flax import serialization
from PIL import Image

from pipelines import extractors, pretrained
from pipelines.flow import FlowPipeline
from tests.forked import ROOT
from tests.small import write_autoencoder
from tests.test_shards import write as write_shards
from utils import shards, statistics, tfds
from utils.cli import UserError
from utils.pictures import open_pictures
from utils.samples import open_samples
from utils.sources import CorruptPicture, check_packed, decode

GIGABYTE = 2**30
DEEP = "[" * 100_000  # JSON that a recursive reader falls into


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(tmp_path):
    """The pickle; at the end its file must not be there, which once it was."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(path)))
    assert path.is_dir()
    path.rmdir()
    yield Canary(path)
    assert not path.exists()


def told(call) -> str:
    """The one line of a UserError."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG that claims these sizes, whatever its content."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def picture(size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (9, 90, 200)).save(file, "png")
    return file.getvalue()


# Pickles.


def test_a_pickle_is_never_loaded(canary, tmp_path):
    array = np.array([canary], dtype=object)
    np.savez(tmp_path / "a.npz", mu=array, sigma=array, arr_0=array)
    assert "pickled objects" in told(lambda: statistics.read(tmp_path / "a.npz"))
    assert "Object arrays cannot be loaded" in told(lambda: open_samples(tmp_path / "a.npz"))
    weights = str(tmp_path / "a.npz")
    assert "Object arrays" in told(lambda: extractors.load("mobilenet", weights=weights))
    for suffix in pretrained.PICKLES:
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(pickle.dumps({"a": canary}))
        refused = told(lambda path=path: extractors.load("inception", weights=str(path)))
        assert "is a pickle, and reading one runs what it says" in refused


def test_a_pickle_by_another_name_is_not_loaded(canary, tmp_path):
    content = pickle.dumps({"a": canary})
    for name in ("w.npz", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
        told(lambda name=name: extractors.load("mobilenet", weights=str(tmp_path / name)))
    told(lambda: statistics.read(tmp_path / "w.npz"))
    told(lambda: open_samples(tmp_path / "w.npz"))
    with pytest.raises(CorruptPicture, match="of no known kind"):
        decode(content, "a.png")


def test_a_pickle_among_shards_is_not_loaded(canary, tmp_path):
    write_shards(tmp_path / "data")
    np.save(tmp_path / "data" / "index.npy", np.array([canary], dtype=object), allow_pickle=True)
    assert "cannot be read" in told(lambda: shards.MomentsSource(tmp_path / "data"))


@pytest.mark.skipif(not __import__("importlib.util").util.find_spec("torch"), reason="no torch")
def test_torch_loads_tensors_only(canary, tmp_path):
    import torch

    torch.save({"a": canary}, tmp_path / "w.pth")
    told(lambda: extractors.convert(tmp_path / "w.pth", tmp_path / "w.safetensors"))
    assert not (tmp_path / "w.safetensors").exists()


# Bombs: each is read by a process of its own room, which tells its peak of memory.

READ = """
import json, resource, sys
from utils import statistics
from utils.cli import UserError
from utils.pictures import open_pictures
from utils.samples import open_samples
from utils.shards import MomentsSource
from utils.sources import decode
from pipelines import extractors, pretrained

readers = {
    "statistics": statistics.read,
    "samples": lambda path: open_samples(path).source.gather([0]),
    "picture": lambda path: decode(open(path, "rb").read(), "picture"),
    "pictures": lambda path: open_pictures(path).picture(0),
    "weights": lambda path: extractors.load("mobilenet", weights=path),
    "autoencoder": pretrained.load_autoencoder,
    "shards": MomentsSource,
}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

for line in sys.stdin:
    reader, path = json.loads(line)
    before = peak()
    try:
        readers[reader](path)
        words = ""
    except UserError as error:
        words = str(error)
    print(json.dumps([words, peak() - before]), flush=True)
"""


@pytest.fixture(scope="module")
def room():
    """(reader, path) → (what it was told, bytes by which its peak of memory rose)."""
    process = subprocess.Popen(
        [sys.executable, "-c", READ],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def read(reader: str, path: pathlib.Path) -> tuple[str, int]:
        process.stdin.write(json.dumps([reader, str(path)]) + "\n")
        process.stdin.flush()
        return tuple(json.loads(process.stdout.readline()))

    yield read
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()


@pytest.fixture(scope="module")
def zeros(tmp_path_factory) -> pathlib.Path:
    """A zip with 3 GB of zeros under several names, each in 3 MB."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.zip"
    header = io.BytesIO()
    shape = (3 * GIGABYTE // 8 // 2048, 2048)
    about = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.png", "w", force_zip64=True) as member,
    ):
        member.write(header.getvalue())
        for _ in range(3 * 64):
            member.write(bytes(GIGABYTE // 64))
    return path


def renamed(source: pathlib.Path, to: pathlib.Path, name: str) -> pathlib.Path:
    """The same zip with its one member, a.png, called otherwise; names are of one length."""
    assert len(name) == 5
    content = source.read_bytes()
    assert content.count(b"a.png") == 2
    to.write_bytes(content.replace(b"a.png", name.encode()))
    return to


@pytest.mark.parametrize(
    ("reader", "file", "name"),
    [
        ("pictures", "a.zip", "a.png"),
        ("statistics", "a.npz", "m.npy"),
        ("weights", "a.npz", "w.npy"),
        ("samples", "a.npz", "x.npy"),
    ],
)
def test_a_zip_bomb_is_not_unpacked(room, zeros, tmp_path, reader, file, name):
    words, grown = room(reader, renamed(zeros, tmp_path / file, name))
    assert words and grown < GIGABYTE // 4
    if reader != "samples":  # which looks for arr_0, and there is none
        assert "unpack to 3.2 GB" in words


def test_real_arrays_are_no_bombs(tmp_path):
    np.savez_compressed(tmp_path / "even.npz", arr_0=np.zeros((300, 256, 256, 3), np.uint8))
    check_packed(tmp_path / "even.npz")  # 59 MB of one colour: below what any machine holds
    noise = np.random.default_rng(0).integers(256, size=(500, 256, 256, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "noise.npz", arr_0=noise)
    check_packed(tmp_path / "noise.npz")


@pytest.mark.parametrize("shape", [(10**13,), (10**6, 10**7), (2**62, 4)])
def test_a_header_that_claims_terabytes(room, tmp_path, shape):
    member = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, about)
    for name in ("mu", "sigma", "arr_0", "w"):
        with zipfile.ZipFile(tmp_path / "a.npz", "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{name}.npy", member.getvalue() + bytes(64))
    for reader in ("statistics", "samples", "weights"):
        words, grown = room(reader, tmp_path / "a.npz")
        assert "a.npz cannot be read" in words or "damaged" in words
        assert grown < GIGABYTE // 4


def test_an_index_that_claims_terabytes(room, tmp_path):
    write_shards(tmp_path / "data")
    with (tmp_path / "data" / "index.npy").open("wb") as file:
        about = {"descr": shards.INDEX.descr, "fortran_order": False, "shape": (10**12,)}
        np.lib.format.write_array_header_1_0(file, about)
    words, grown = room("shards", tmp_path / "data")
    assert "index.npy" in words and grown < GIGABYTE // 4


def test_a_safetensors_header_that_lies(room, tmp_path):
    for about in (
        {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
        {"a": {"dtype": "F32", "shape": [2**63, 4], "data_offsets": [0, 64]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
    ):
        header = json.dumps(about).encode()
        content = struct.pack("<Q", len(header)) + header + bytes(64)
        for body in (content, struct.pack("<Q", 2**62) + content[8:]):
            (tmp_path / "w.safetensors").write_bytes(body)
            words, grown = room("weights", tmp_path / "w.safetensors")
            assert "damaged" in words and grown < GIGABYTE // 4


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (9, 2**31 - 1)])
def test_a_picture_that_claims_billions_of_pixels(room, tmp_path, size):
    (tmp_path / "a.png").write_bytes(png(*size, rows=bytes(10_000_000)))
    assert (tmp_path / "a.png").stat().st_size < 100_000
    words, grown = room("picture", tmp_path / "a.png")
    assert "is no readable picture" in words and grown < GIGABYTE // 4


def test_a_msgpack_that_claims_billions(room, tmp_path):
    folder = write_autoencoder(tmp_path / "vae")
    weights = folder / "diffusion_flax_model.msgpack"
    huge = {"__msgpack_chunked_array__": True, "shape": {"0": 10**12}, "chunks": {"0": np.ones(2)}}
    for content in (
        b"\xdd\xff\xff\xff\xff",  # a list of 2**32 items
        b"\xdf\xff\xff\xff\xff",  # a map of as many
        b"\xc6\xff\xff\xff\xff",  # 4 GB of bytes
        b"\x91" * 100_000,  # lists in lists
        serialization.msgpack_serialize({"a": huge}),
        serialization.msgpack_serialize({1: np.ones(2), 2: [np.ones(2)]}),
    ):
        weights.write_bytes(content)
        words, grown = room("autoencoder", folder)
        assert words and "\n" not in words and grown < GIGABYTE // 4, content[:20]


# Pictures.


def test_a_kind_that_runs_a_program_is_not_decoded(tmp_path):
    """Pillow gives PostScript to Ghostscript, which interprets it."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) (w) file\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(CorruptPicture, match="of no known kind"):
        decode(eps, "a.png")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_odd_pictures_are_decoded_or_told(share):
    frames = [Image.new("P", (8, 8), i) for i in range(3)]
    animated = io.BytesIO()
    frames[0].save(animated, "gif", save_all=True, append_images=frames[1:])
    assert decode(animated.getvalue(), "a.gif").size == (8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    turned = io.BytesIO()
    Image.new("RGB", (8, 4)).save(turned, "jpeg", exif=exif)
    assert decode(turned.getvalue(), "a.jpg").size == (8, 4)  # as published statistics have it
    for content in (animated.getvalue(), turned.getvalue(), picture(64)):
        cut = content[: int(share * len(content))]
        try:
            decode(cut, "cut")
        except CorruptPicture as error:
            assert "\n" not in str(error)


# Archives and folders.


def test_names_in_a_zip_lead_nowhere(tmp_path):
    """They are read in place, so that no name is a place; those that lead up are left out."""
    path = tmp_path / "in" / "a.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../../evil.png", "/etc/evil.png", "a/../../b.png", "good.png", "C:\\x.png"):
            archive.writestr(name, picture())
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    pictures = open_pictures(str(path), dataset_name="celebahq256")
    names = [pictures.name(i) for i in range(len(pictures.keys))]
    assert "good.png" in names and not any(".." in name for name in names)
    for i, name in enumerate(names):
        if name == "link.png":
            with pytest.raises(CorruptPicture):
                pictures.picture(i)
        else:
            pictures.picture(i)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.zip", "in"]


def test_a_zip_of_locked_or_rarely_packed_members(tmp_path):
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
            archive.writestr("a.png", picture())
        assert "unpack the .zip" in told(lambda: open_pictures(str(tmp_path / "a.zip")).read(0))
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("a.png", picture())
    content = bytearray((tmp_path / "b.zip").read_bytes())
    content[6] |= 1  # encrypted, by the member's header and by the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "b.zip").write_bytes(content)
    assert "unpack the .zip" in told(lambda: open_pictures(str(tmp_path / "b.zip")).read(0))


def test_a_zip_whose_directory_lies(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("é.png", picture())
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace("é".encode(), b"\xff\xfe"))  # no UTF-8
    assert "is no whole .zip" in told(lambda: open_pictures(str(tmp_path / "a.zip")))


def test_links_and_pipes_in_a_folder(tmp_path):
    for name in ("loop", "nothing", "pipe", "endless"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture())
    (tmp_path / "loop" / "up").symlink_to(tmp_path / "loop")
    (tmp_path / "nothing" / "b.png").symlink_to(tmp_path / "none.png")
    os.mkfifo(tmp_path / "pipe" / "b.png")
    (tmp_path / "endless" / "b.png").symlink_to("/dev/zero")
    assert "remove that link" in told(lambda: open_pictures(str(tmp_path / "loop")))
    assert "a link to nothing" in told(lambda: open_pictures(str(tmp_path / "nothing")))
    for name in ("pipe", "endless"):
        assert "is no regular file" in told(lambda n=name: open_pictures(str(tmp_path / n)))


def test_a_name_of_any_bytes(tmp_path):
    """Linux allows them; they are pictures like others."""
    (tmp_path / os.fsdecode(b"\xff\xe9.png")).write_bytes(picture())
    assert open_pictures(str(tmp_path)).picture(0)[0].size == (8, 8)


# What folders say of themselves.

CARDS = {
    "shards": {"shards": 10**12},
    "no shards": {"shards": -1},
    "shape": {"shape": [10**9, 10**9, 8]},
    "dtype": {"dtype": "object"},
    "kind": {"kind": "pickle"},
    "words": {"dataset_name": ["folder"]},
    "keys": {"skipped_keys": [-1]},
    "source": {"source": {"source": "x", "data_dir": "", "split": "train", "open": "y"}},
    "autoencoder": {"autoencoder": {"name": "x"}},
    "size": {"shard_size": 0},
    "count": {"count": "many"},
    "more": {"run": "code"},
}


@pytest.mark.parametrize("case", CARDS)
def test_a_card_that_lies(tmp_path, case):
    write_shards(tmp_path)
    path = tmp_path / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | CARDS[case]))
    assert "is no card of prepare_data.py" in told(lambda: shards.MomentsSource(tmp_path))


def test_a_card_that_is_deep_and_records_that_are_short(tmp_path):
    write_shards(tmp_path / "data")
    card = shards.read_card(tmp_path / "data")
    shard = shards.shard_path(tmp_path / "data", card, 0)
    shards.write_shard(shard, [b"short"] * card.expected(0))
    source = shards.MomentsSource(tmp_path / "data")
    assert "records of another length" in told(lambda: source.gather([0]))
    pictures = dataclasses.replace(card, kind="pictures", dtype="uint8")
    shards.write_card(tmp_path / "data", pictures)
    encoded = shards.open_shards(tmp_path / "data", card.dataset_name)
    assert "is no picture" in told(lambda: encoded.read(0))
    index = np.load(tmp_path / "data" / "index.npy")
    index["label"][0] = 10**6
    shards.write_index(tmp_path / "data", index)
    assert "labels that its card has not" in told(
        lambda: shards.open_shards(tmp_path / "data", card.dataset_name)
    )
    (tmp_path / "data" / "card.json").write_text(DEEP)
    assert "is no card" in told(lambda: shards.read_card(tmp_path / "data"))


UNET = {"name": "unet", "channel_multipliers": [1, 1, 1]}
MODELS = {
    "shape": ({}, {"shape": [10**9, 10**9, 3]}),
    "no shape": ({}, {"shape": "8,8,1"}),
    "classes": ({}, {"num_classes": 10**12}),
    "pictures": ({}, {"pictures": {"source": {"source": "/", "open": 1}}}),
    "steps": ({}, {"train_steps": "many", "flops_per_step": "x"}),
    "width": ({"model": {"hidden_size": 10**9}}, {}),
    "depth": ({"model": {"depth": 10**9}}, {}),
    "patches": ({"model": {"patch_size": 1}}, {"shape": [4096, 4096, 1]}),
    "type": ({"batch_size": "many"}, {}),
    "key": ({"model": {"__class__": "x"}}, {}),
    "group": ({"model": 3}, {}),
    "list": ({"sample": {"steps": [10**12]}}, {}),
    "second head": ({"model": {"velocity_head": 10**9}}, {}),
    "levels": ({"shortcut": {"levels": 10**9}}, {}),
    "levels of words": ({"shortcut": {"levels": "7"}}, {}),
    "wide U-Net": ({"model": UNET | {"hidden_size": 90_000, "mlp_ratio": 0.01}}, {}),
    "deep U-Net": ({"model": UNET | {"depth": 1000}}, {}),
    "halved U-Net": ({"model": UNET | {"channel_multipliers": [1] * 10**5}}, {}),
    "U-Net's pixels": ({"model": UNET}, {"shape": [4096, 4096, 1]}),
}
NO_LIST = (10**30, [10**30], [math.nan], ["1"], [[1, 2]], [[[]], 1], [True], [None], {"a": 1}, "1")
LISTS = {
    "model.channel_multipliers": NO_LIST,
    "model.attention_resolutions": NO_LIST,
    **dict.fromkeys(("ema.also", "ema.posthoc"), (*NO_LIST, [0.5] * 10**5)),
    **dict.fromkeys(
        ("alpha_flow.transition", "consistency.transition", "mean_flow.tangent"),
        (*NO_LIST, [0, 10**30], [0, math.nan], [0, "9"], [0, [9]], [0] * 10**5),
    ),
    **dict.fromkeys(
        (f"{name}.time_range" for name in ("flow_matching", "alpha_flow", "consistency")),
        (*NO_LIST, [0, 10**30], [math.nan, 1], ["0", 1], [[0], 1], [0.5] * 10**5),
    ),
}


def described(tmp_path, config: dict, card: dict) -> str:
    """The one line about an exported model with these changes."""
    example = ROOT / "pretrained" / "digits_mean_flow"
    for name, change in {"config.json": config, "card.json": card}.items():
        values = json.loads((example / name).read_text())
        for key, value in change.items():
            both = isinstance(value, dict) and isinstance(values.get(key), dict)
            values[key] = values[key] | value if both else value
        (tmp_path / name).write_text(json.dumps(values))
    words = told(lambda: FlowPipeline.describe(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["card.json", "config.json"]
    return words


@pytest.mark.parametrize("case", MODELS)
def test_an_exported_model_that_lies(tmp_path, case):
    described(tmp_path, *MODELS[case])


@pytest.mark.parametrize("key", LISTS)
def test_a_config_with_lists_of_anything(tmp_path, key):
    section, name = key.split(".")
    of = UNET if section == "model" else {}
    for value in LISTS[key]:
        words = described(tmp_path, {section: of | {name: value}}, {})
        assert name in words, value


@pytest.mark.parametrize("name", ["config.json", "card.json"])
@pytest.mark.parametrize("text", [DEEP, "[]", '{"a.b": {"c": 1}}', '{"": 1}', "\xff", "1" * 5000])
def test_json_that_is_none_of_ours(tmp_path, name, text):
    example = ROOT / "pretrained" / "digits_mean_flow"
    for file in ("config.json", "card.json"):
        (tmp_path / file).write_text((example / file).read_text())
    (tmp_path / name).write_text(text, encoding="latin-1")
    told(lambda: FlowPipeline.describe(tmp_path))


def test_tfds_imports_no_module_that_data_names(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("import os\nos.mkdir('canary')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "data" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"name": "data", "version": "1.0.0"}')
    for text in (
        '{"pythonClassName": "stranger.Feature"}',
        '{"type": "stranger.Feature", "content": {}}',
        '{"python_class_name": "tensorflow_datasets.core.features.features_dict.FeaturesDict", '
        '"featuresDict": {"features": {"image": {"pythonClassName": "stranger.Feature"}}}}',
    ):
        (folder / "features.json").write_text(text)
        assert "which is no class of TFDS" in told(lambda: tfds.open_version(folder, "train"))
    (folder / "features.json").write_text(DEEP)
    assert "is not JSON" in told(lambda: tfds.open_version(folder, "train"))
    assert not (tmp_path / "canary").exists()
