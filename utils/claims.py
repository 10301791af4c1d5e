"""Leases on jobs, for processes of any machines that share a folder, also over NFS: no flock.

A claim on a job is a file NAME.claim.G made with O_CREAT | O_EXCL, which exactly one process can
do. Its holder renews the file's time of change; a claim that is not renewed is dead, and so is, at
once, one of a process of this machine that has ended. Who finds generation G dead makes G + 1, and
again exactly one process can. Had the dead file been removed to make room instead, a slow rival
could remove the fresh claim of a faster one (the lock files of Lamport's and of many mail programs
fail so): here a living claim is removed by its holder alone.

A claim keeps work from being done twice; it is no proof. A process may be stopped for longer than
its claim lives and go on, so ask `Claim.held` before a result is written, and write it atomically.
What was done by whoever released the claim last, a new holder must look up: take, then look.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import psutil

_PAUSE = 0.05  # seconds before a list of files that was old is asked for again


class Claims:
    """Claims on the jobs of one folder.

    Args:
      folder: where the claims lie; made if it is not there.
      expires: seconds after which a claim that was not renewed is dead. Over NFS more than the
        minute for which a client may remember a file's time; the same for all who share a folder.
      beat: seconds between two renewals.

    Raises:
      ValueError: `beat` is not below half of `expires`, so that one late renewal loses a claim.
      OSError: on any call, where the folder cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike, expires: float = 300.0, beat: float = 20.0
    ) -> None:
        if not 0 < beat < expires / 2:
            raise ValueError(f"beat {beat} s must be below half of expires, {expires} s")
        self.folder, self.expires, self.beat = pathlib.Path(folder), expires, beat
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def take(self, name: str) -> Iterator["Claim | None"]:
        """Claims job `name` for the time of the context; gives None where somebody alive has it.

        Another thread of this process counts as somebody. The claim is renewed by a daemon thread.

        Raises:
          ValueError: `name` is no file name.
        """
        if not name or name.startswith(".") or "/" in name or os.sep in name:
            raise ValueError(f"{name!r} is no file name that a claim could start with")
        claim = self._acquire(name)
        if claim is None:
            yield None
            return
        renewer = threading.Thread(target=claim._renew, args=(self.beat,), daemon=True)
        renewer.start()
        try:
            yield claim
        finally:
            claim._released.set()
            renewer.join()
            claim._remove()

    def holder(self, name: str) -> str:
        """'host:pid' of who holds a living claim on `name`, 'unknown' for one just made, or ''."""
        latest = _latest(self.folder, name)
        seen = _read(_path(self.folder, name, latest)) if latest is not None else None
        if seen is None or self._is_dead(seen):
            return ""
        return f"{seen.owner.host}:{seen.owner.pid}" if seen.owner else "unknown"

    def _acquire(self, name: str) -> "Claim | None":
        """A claim that nobody else has; None where somebody has one."""
        while True:
            latest = _latest(self.folder, name)
            dead = None
            if latest is not None:
                dead = _read(_path(self.folder, name, latest))
                if dead is None:  # released since it was listed
                    time.sleep(_PAUSE)
                    continue
                if not self._is_dead(dead):
                    return None
            claim = Claim(self.folder, name, 0 if latest is None else latest + 1)
            if claim._make() and claim._settle(dead):
                return claim

    def _is_dead(self, seen: "_Seen") -> bool:
        owner = seen.owner
        if owner and owner.machine == _machine() and _has_ended(owner.pid, owner.started):
            return True
        return _now(self.folder) - seen.changed > self.expires


class Claim:
    """A claim that this process made; `Claims.take` gives it."""

    def __init__(self, folder: pathlib.Path, name: str, generation: int) -> None:
        self.name, self._folder, self._generation = name, folder, generation
        self._path = _path(folder, name, generation)
        self._owner = _this_process()
        self._released = threading.Event()

    def held(self) -> bool:
        """Whether the claim is still ours: nobody took it over while this process was stopped.

        False, too, where the folder cannot be read.
        """
        try:
            return self._is_there() and _latest(self._folder, self.name) == self._generation
        except OSError:
            return False

    def _is_there(self) -> bool:
        seen = _read(self._path)
        return seen is not None and seen.owner == self._owner

    def _make(self) -> bool:
        """Makes the file; whether no rival had made it before."""
        try:
            file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(file, json.dumps(self._owner._asdict()).encode())
        except OSError:  # a full disk: an empty claim would keep others away until it expires
            self._path.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)
        return True

    def _settle(self, dead: "_Seen | None") -> bool:
        """Removes older generations; False, and no claim, where the view it rested on was old.

        Older generations go from the lowest up, and all before the claim itself. So while the dead
        one is there, the same file as when it was judged, nobody has had this generation before;
        if it is gone, a rival may have had it, released it, and others may hold newer ones.
        """
        if dead is not None:
            seen = _read(_path(self._folder, self.name, self._generation - 1))
            if seen is None or seen.owner != dead.owner:
                self._remove()
                return False
        generations = _generations(self._folder, self.name)
        if generations[-1:] != [self._generation]:
            self._remove()
            return False
        for generation in generations[:-1]:
            _path(self._folder, self.name, generation).unlink(missing_ok=True)
        return True

    def _renew(self, beat: float) -> None:
        while not self._released.wait(beat):
            with contextlib.suppress(OSError):  # a server that is away may come back
                if self._is_there():
                    os.utime(self._path)  # to the time of the file system, not of this machine

    def _remove(self) -> None:
        """Removes the file, unless it was lost and another process now has one of that name."""
        if self._is_there():
            self._path.unlink(missing_ok=True)


# What lies in the folder.


class _Owner(NamedTuple):
    """The content of a claim's file, as JSON."""

    host: str
    pid: int
    started: float  # seconds after boot
    machine: str
    token: str  # names this one claim


class _Seen(NamedTuple):
    changed: float  # seconds, by the file system's clock
    owner: _Owner | None  # None while it is being written


def _path(folder: pathlib.Path, name: str, generation: int) -> pathlib.Path:
    return folder / f"{name}.claim.{generation}"


def _generations(folder: pathlib.Path, name: str) -> list[int]:
    """The generations of the claims on `name` that are there, from the lowest up."""
    pattern = re.compile(re.escape(name) + r"\.claim\.(\d+)")
    found = (pattern.fullmatch(file) for file in os.listdir(folder))
    return sorted(int(match[1]) for match in found if match)


def _latest(folder: pathlib.Path, name: str) -> int | None:
    return max(_generations(folder, name), default=None)


def _read(path: pathlib.Path) -> _Seen | None:
    """A claim's file as it is now; None where there is none.

    Its time is read after it is opened: NFS asks the server on opening, and for a time alone need
    not.
    """
    try:
        with path.open("rb") as file:
            changed, content = os.fstat(file.fileno()).st_mtime, file.read()
    except FileNotFoundError:
        return None
    try:
        return _Seen(changed, _Owner(**json.loads(content)))
    except (ValueError, TypeError):
        return _Seen(changed, None)


def _now(folder: pathlib.Path) -> float:
    """The time by the clock that stamps the folder's files, in seconds."""
    with tempfile.TemporaryFile(dir=folder) as file:  # nameless: nothing stays behind when killed
        os.utime(file.fileno())
        return os.fstat(file.fileno()).st_mtime


# Processes.


def _this_process() -> _Owner:
    """What a new claim of this process says."""
    process, token = psutil.Process(), secrets.token_hex(8)
    return _Owner(socket.gethostname(), process.pid, _started(process), _machine(), token)


def _started(process: psutil.Process) -> float:
    """Seconds from boot to the process's start: unlike the date, no set clock changes it."""
    return process.create_time() - psutil.boot_time()


@functools.cache
def _machine() -> str:
    """Names whose processes this one can see: the machine and its boot, the container, the user.

    Host names alone do not: containers share them, and the hidden processes of other users look
    like ended ones.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux has these
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    if hasattr(os, "getuid"):
        parts.append(str(os.getuid()))
    return " ".join(parts)


def _has_ended(pid: int, started: float) -> bool:
    """Whether the process of this machine with that number is gone, or is another one by now."""
    try:
        process = psutil.Process(pid)
        ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return ended or abs(_started(process) - started) > 1
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
