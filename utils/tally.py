"""What the metrics need of many pictures' features, gathered in one pass that can be interrupted.

A folder holds `sums.npz`, the sums of `utils.fid` as they were at the last save, and
`features.npy`, the pool features themselves, row by row: KID, precision and recall need them all.
Resident memory does not grow with the number of pictures.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import UserError
from utils.fid import FeatureStats, ScoreSums

# Rows that are added to the sums at a time, whatever the batches were: sums depend on the order
# of the pictures alone, and an outer product of 2048² is not made for every small batch.
BLOCK = 1024
_NPY = np.dtype("<f4")


class Tally:
    """All that the metrics need of `total` pictures' features, from one pass over them.

    The sums are a function of the pictures' features in their order: neither batch size nor
    interruption changes a bit of them.

    Attributes:
      count: pictures so far.
    """

    def __init__(self, folder: Path, total: int, parts: Sequence[str], kept: np.ndarray | None):
        """Begins from nothing; see `open`."""
        if kept is not None and len(kept) and not _increasing(kept, total):
            raise ValueError(f"kept: increasing numbers from 0 to {total - 1}")
        self._folder, self._total, self._kept = Path(folder), total, kept
        self._parts = tuple(sorted(parts))
        self._sums: dict[str, FeatureStats | ScoreSums] = {}
        self._pending: dict[str, list[np.ndarray]] = {part: [] for part in self._parts}
        self._folded = 0  # pictures that are in the sums; those from here to `count` are pending
        self._width = 0  # of the pool features; 0: none seen yet
        self.count = 0

    @classmethod
    def open(
        cls,
        folder: Path,
        total: int,
        parts: Sequence[str] = ("pool", "spatial", "logits"),
        kept: np.ndarray | None = None,
    ) -> "Tally":
        """Continues from the last `save` in `folder`, or begins from nothing.

        Args:
          folder: made where it is missing; no other tally may be at work in it.
          total: pictures there will be.
          parts: which features are wanted: pool and spatial for sums, logits for scores.
          kept: increasing int64 numbers of the pictures whose pool features are stored; None: all.

        A save towards another `total`, of other `parts` or with others `kept`, and one whose files
        are damaged, counts for nothing.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        tally = cls(folder, total, parts, kept)
        return tally if tally._restore() else cls(folder, total, parts, kept)

    @classmethod
    def is_whole(
        cls, folder: Path, total: int, parts: Sequence[str], kept: np.ndarray | None = None
    ) -> bool:
        """Whether all `total` pictures were saved in `folder`; touches nothing, unlike `open`.

        Another process may be at work there.
        """
        tally = cls(folder, total, parts, kept)
        try:
            with np.load(Path(folder) / "sums.npz", allow_pickle=False) as found:
                about = json.loads(str(found["about"]))
        except (FileNotFoundError, zipfile.BadZipFile, ValueError, KeyError, EOFError):
            return False
        return about.get("count") == total and all(
            about.get(key) == value for key, value in _plain(tally._about()).items()
        )

    def update(self, features: Mapping[str, np.ndarray]) -> None:
        """Adds the next n pictures, in order.

        Args:
          features: name → (n, d) for all parts asked for; others are ignored.

        Raises:
          UserError: features that are not finite; nothing was added then.
          ValueError: parts of different lengths or other widths than before, or more than `total`.
        """
        # Of their own: what lies pending must not change with the caller's buffer.
        arrays = {part: np.array(features[part], np.float32) for part in self._parts}
        n = self._check(arrays)
        if "pool" in arrays:
            self._store(arrays["pool"])
        for part, values in arrays.items():
            self._pending[part].append(values)
        self.count += n
        if self.count - self._folded >= BLOCK:
            self._fold()

    def save(self) -> None:
        """Makes all so far last: the next `open` continues here.

        Features reach the disk first; the sums, which say how many count, are renamed into place.
        """
        if self._file.exists():
            with self._file.open("rb") as file:
                os.fsync(file.fileno())
        arrays: dict[str, Any] = {"about": np.array(json.dumps(self._about() | self._progress()))}
        for part in self._sums:
            for name, value in self._sums[part]._asdict().items():
                arrays[f"{part}_{name}"] = np.asarray(value)
        for part, values in self._pending.items():
            if values:
                arrays[f"{part}_pending"] = np.concatenate(values)
        part_file = self._folder / "sums.npz.part"
        with part_file.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        part_file.replace(self._folder / "sums.npz")

    @property
    def stats(self) -> dict[str, FeatureStats]:
        """Sums of "pool" and "spatial", as far as asked for; empty before the first picture."""
        found = {part: self._whole(part) for part in self._parts if part != "logits" and self.count}
        return {part: sums for part, sums in found.items() if isinstance(sums, FeatureStats)}

    @property
    def scores(self) -> ScoreSums | None:
        """Sums of "logits"; None where not asked for, or before the first picture."""
        found = self._whole("logits") if "logits" in self._parts and self.count else None
        return found if isinstance(found, ScoreSums) else None

    @property
    def features(self) -> np.ndarray:
        """The pool features kept so far, float32 (rows, d): a read-only memory map."""
        rows = self._rows(self.count)
        if not rows or not self._width:
            return np.empty((0, self._width), np.float32)
        shape = (rows, self._width)
        return np.memmap(self._file, _NPY, "r", self._header_size(), shape)

    def remove(self) -> None:
        """Deletes the files, and the folder where nothing else is in it."""
        for name in ("sums.npz", "sums.npz.part", "features.npy"):
            (self._folder / name).unlink(missing_ok=True)
        if not any(self._folder.iterdir()):
            self._folder.rmdir()

    # Sums.

    def _check(self, arrays: Mapping[str, np.ndarray]) -> int:
        lengths = {len(values) for values in arrays.values()}
        if len(lengths) != 1 or self.count + max(lengths) > self._total:
            raise ValueError(f"{lengths} pictures after {self.count} of {self._total}")
        for part, values in arrays.items():
            before = self._width_of(part)
            if values.ndim != 2 or before not in (0, values.shape[1]):
                raise ValueError(f"{part}: features (n, {before or 'd'}), not {values.shape}")
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                number = self.count + int(finite.argmin())
                raise UserError(
                    f"picture {number:,}: its {part} features are not finite; look at what drew "
                    "it: a run that diverged has an earlier checkpoint"
                )
        return lengths.pop()

    def _width_of(self, part: str) -> int:
        if self._pending[part]:
            return self._pending[part][0].shape[1]
        sums = self._sums.get(part)
        if isinstance(sums, ScoreSums):
            return sums.p.shape[1]
        return len(sums.total) if sums else 0

    def _fold(self) -> None:
        """Adds whole blocks of what is pending to the sums."""
        whole = (self.count - self._folded) // BLOCK * BLOCK
        for part in self._parts:
            rows = np.concatenate(self._pending[part])
            for start in range(0, whole, BLOCK):
                block = rows[start : start + BLOCK]
                self._sums[part] = self._added(part, block, self._folded + start)
            self._pending[part] = [rows[whole:].copy()]
        self._folded += whole

    def _added(self, part: str, rows: np.ndarray, first: int) -> FeatureStats | ScoreSums:
        sums = self._sums.get(part)
        if part == "logits":
            scores = sums if isinstance(sums, ScoreSums) else None
            scores = scores or ScoreSums.empty(self._total, rows.shape[1])
            return scores.update(rows, first)
        stats = sums if isinstance(sums, FeatureStats) else None
        return (stats or FeatureStats.empty(rows.shape[1])).update(rows)

    def _whole(self, part: str) -> FeatureStats | ScoreSums:
        """The sums with what is pending."""
        return self._added(part, np.concatenate(self._pending[part]), self._folded)

    # The file of features.

    @property
    def _file(self) -> Path:
        return self._folder / "features.npy"

    def _rows(self, count: int) -> int:
        """How many of the first `count` pictures have their features stored."""
        return count if self._kept is None else int(np.searchsorted(self._kept, count))

    def _header(self) -> bytes:
        """The .npy header of the whole file: a reader finds it true once all is there."""
        shape = (self._rows(self._total), self._width)
        fields = {"descr": _NPY.str, "fortran_order": False, "shape": shape}
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, fields)
        return header.getvalue()

    def _header_size(self) -> int:
        return len(self._header())

    def _store(self, values: np.ndarray) -> None:
        """Writes the rows that are kept at their place; ordinary writes hold no memory."""
        if not self._width:
            self._width = values.shape[1]
            self._file.write_bytes(self._header())
        if self._kept is not None:
            first, last = np.searchsorted(self._kept, [self.count, self.count + len(values)])
            values = values[self._kept[first:last] - self.count]
        with self._file.open("r+b") as file:
            file.seek(self._size(self.count))
            file.write(values.astype(_NPY, copy=False).tobytes())

    def _size(self, count: int) -> int:
        """Bytes of the file that holds the first `count` pictures."""
        return self._header_size() + self._rows(count) * self._width * _NPY.itemsize

    # Saving.

    def _about(self) -> dict[str, Any]:
        """What must be the same for a save to be continued."""
        kept = "all"
        if self._kept is not None:
            kept = hashlib.sha256(np.asarray(self._kept, "<i8").tobytes()).hexdigest()
        return {"total": self._total, "parts": self._parts, "kept": kept, "block": BLOCK}

    def _progress(self) -> dict[str, int]:
        return {"count": self.count, "folded": self._folded, "width": self._width}

    def _restore(self) -> bool:
        """Takes the last save over; False: there is none of this kind, or it is damaged."""
        try:
            path = self._folder / "sums.npz"
            # Opened here: NumPy leaves a file open that it finds damaged.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
                about = json.loads(str(found["about"]))
                if any(about[key] != value for key, value in _plain(self._about()).items()):
                    return False
                self._take(about, found)
                if "pool" in self._parts and self._width:
                    if self._file.stat().st_size < self._size(self.count):
                        return False
                    os.truncate(self._file, self._size(self.count))
        except (FileNotFoundError, zipfile.BadZipFile, ValueError, KeyError, EOFError):
            return False
        return True

    def _take(self, about: Mapping[str, int], found: Mapping[str, np.ndarray]) -> None:
        self.count, self._folded, self._width = (about[k] for k in ("count", "folded", "width"))
        for part in self._parts:
            if f"{part}_pending" in found:
                self._pending[part] = [found[f"{part}_pending"]]
            if self._folded:
                kind: Any = ScoreSums if part == "logits" else FeatureStats
                values = (found[f"{part}_{name}"] for name in kind._fields)
                self._sums[part] = kind(*(v if v.ndim else int(v) for v in values))


def _increasing(kept: np.ndarray, total: int) -> bool:
    return bool(kept[0] >= 0 and kept[-1] < total and (np.diff(kept) > 0).all())


def _plain(about: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(about))
