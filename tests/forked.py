"""Commands without the seconds that their imports take: one process imports, each call is a fork.

`Commands` starts `python -m tests.forked`, which imports what the commands need and then forks for
every line that it is sent. The child runs the script as `python SCRIPT ...` does, with its own
flags, folder and devices; it starts before any device does, as jax needs it.
"""

import json
import os
import pathlib
import runpy
import select
import subprocess
import sys
import tempfile
import traceback
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
SECONDS = 120.0  # of one command
SURROUNDINGS = {  # what one command compiles, the next does not; Python keeps nothing of configs
    "PYTHONDONTWRITEBYTECODE": "1",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax_forked"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


class Done(NamedTuple):
    """How a command ended: exit status (negative: a signal's number) and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class Commands:
    """Runs commands; a context, whose end ends its process."""

    def __enter__(self) -> "Commands":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=ROOT,
            env=os.environ | SURROUNDINGS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def __call__(self, words: list[str], cwd: pathlib.Path) -> Done:
        """Runs `words`, a script of ROOT by its relative path and its arguments, in `cwd`."""
        self.start(words, cwd)
        return self.done()

    def start(self, words: list[str], cwd: pathlib.Path) -> int:
        """Starts what a call runs; returns its process id. Call `done` before the next."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([words, str(cwd)]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def done(self) -> Done:
        """Waits for the end of what was started."""
        assert self._process.stdout
        return Done(*json.loads(self._process.stdout.readline()))


def _serve() -> None:
    """Reads [words, cwd] by lines; answers with a process id, then [status, stdout, stderr]."""
    for line in sys.stdin:
        words, cwd = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                _become(words, cwd, out.fileno(), err.fileno())
            print(child, flush=True)
            status = _awaited(child)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        print(json.dumps([status, *texts]), flush=True)


def _awaited(child: int) -> int:
    """The exit status of a child, which is killed when its time is over."""
    handle = os.pidfd_open(child)
    if not select.select([handle], [], [], SECONDS)[0]:
        os.kill(child, 9)
    os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become(words: list[str], cwd: str, out: int, err: int) -> None:
    """Runs the script in this process, which ends with it."""
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.chdir(cwd)
        script = str(ROOT / words[0])
        sys.argv = [script, *words[1:]]
        sys.path[0] = str(pathlib.Path(script).parent)
        sys.path.insert(1, str(ROOT))
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


if __name__ == "__main__":
    # What the commands import takes seconds; none of it defines their flags.
    import tensorflow_datasets  # noqa: F401

    import pipelines.curves
    import pipelines.export
    import pipelines.imports.folder
    import pipelines.prepare
    import pipelines.prepare_report
    import pipelines.prepare_statistics
    import pipelines.report
    import pipelines.sampling_files
    import pipelines.sampling_video
    import pipelines.sampling_watch
    import pipelines.sweep
    import pipelines.train  # noqa: F401

    _serve()
