"""Where runs lie, on this machine or in a bucket (gs://BUCKET/FOLDER), and files that are whole.

Buckets are reached by etils.epath and gcsfs; orbax reads and writes checkpoints there by itself.
"""

import contextlib
import importlib.util
import io
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from etils import epath

from utils.cli import UserError

Path = str | os.PathLike

# One client of buckets, whether TensorFlow is installed or not: it is asked for by its errors too.
os.environ["EPATH_USE_TF"] = "false"
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback of what it raises


def place(path: Path) -> epath.Path:
    """A path as it is called from any folder: absolute, ~ expanded; gs://BUCKET/FOLDER as it is.

    pathlib makes gs:/ of gs://, so that what may lie in a bucket goes through here first.

    Raises:
      UserError: another kind of address, or nothing is installed that reaches a bucket.
    """
    text = os.fspath(path)
    if not re.match(r"\w+:/", text):
        return epath.Path(os.path.abspath(os.path.expanduser(text)))
    if not re.match(r"gs://[^/]", text):
        raise UserError(f"{text} is no place for a run: name a folder, or gs://BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text} lies in a bucket, which gcsfs reaches: pip install gcsfs")
    import fsspec

    # Others write there too: TensorStore in this process, and other hosts.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(text)


def in_bucket(path: Path) -> bool:
    """Whether a path names something in a bucket."""
    return "://" in os.fspath(path)


def check_local(**paths: str) -> None:
    """Raises UserError where one of the options names a place in a bucket."""
    for name, path in paths.items():
        if in_bucket(path):
            raise UserError(
                f"--{name}={path}: name a folder of this machine; only --workdir may be a bucket's"
            )


def check_empty(folder: str | os.PathLike, called: str = "") -> None:
    """Raises UserError where files of a folder, a run's config.json say, would be replaced.

    Args:
      called: what the error calls it; empty: its path.
    """
    path = place(folder)
    if names(path) or (path.exists() and not path.is_dir()):
        told = called or os.fspath(folder)
        raise UserError(f"{told} holds files already: name a new folder")


def reach(path: epath.Path) -> None:
    """Raises UserError where a bucket does not answer, or not this account."""
    if in_bucket(path):
        try:
            path.exists()
        except Exception as error:  # of many kinds
            raise UserError(_told(path, "reached", error)) from error


def names(folder: epath.Path) -> list[str]:
    """The names in a folder, in order; none where there is no folder."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def write(path: Path, content: str | bytes | Callable[[BinaryIO], Any]) -> None:
    """Writes a file at once or not at all, and the folder it lies in; an older one is replaced.

    Args:
      content: what it holds, or what writes that to a file given.
    Raises:
      OSError: it could not be written.
    """
    if in_bucket(path):
        held = io.BytesIO()
        _fill(held, content)
        try:
            _client(path).pipe_file(os.fspath(path), held.getvalue())  # an object comes at once
        except Exception as error:  # of many kinds
            raise OSError(_told(path, "written", error)) from error
        return
    with beside(path) as part, part.open("wb") as file:
        _fill(file, content)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[epath.Path]:
    """A temporary name beside a local `path`, renamed to it where all went well."""
    to = epath.Path(path)
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f".{to.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        part.replace(to)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def move(folder: epath.Path, to: epath.Path) -> None:
    """Moves a folder to a name that nothing has; in a bucket, one object after the other."""
    if in_bucket(folder):
        _client(folder).mv(os.fspath(folder), os.fspath(to), recursive=True)
    else:
        to.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(to)


def _fill(file: Any, content: str | bytes | Callable) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content.encode() if isinstance(content, str) else content)


def _client(path: Path) -> Any:
    import fsspec

    return fsspec.core.url_to_fs(os.fspath(path))[0]


def _told(path: Path, done: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    reason = "there is none of that name" if isinstance(error, FileNotFoundError) else reason
    return (
        f"{path} cannot be {done} ({reason}): see that the bucket's name is right and that this "
        "account may use it; `gcloud auth application-default login` says who you are"
    )
