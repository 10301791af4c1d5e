"""Single keys from a terminal, which is as it was on any way out; lines where there is none."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any, TextIO

_ENDS = ("SIGTERM", "SIGHUP")


@contextlib.contextmanager
def keys(stream: TextIO) -> Iterator[Iterator[str]]:
    """Gives an iterator of what is pressed: a letter each, "" for enter, or a line where no
    terminal listens. It ends with the stream.

    Until the context is left keys are not echoed, and need no enter; SIGTERM and SIGHUP end the
    program by SystemExit, so that the terminal is restored then too.
    """
    if not stream.isatty():
        yield (line.strip() for line in stream)
        return
    import termios
    import tty

    terminal = stream.fileno()
    before = termios.tcgetattr(terminal)

    def single(*_: Any) -> None:
        tty.setcbreak(terminal, termios.TCSANOW)

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    handlers = {getattr(signal, name): end for name in _ENDS} | {signal.SIGCONT: single}
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        single()
        yield _pressed(terminal)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        for number, handler in old.items():
            signal.signal(number, handler)


def _pressed(terminal: int) -> Iterator[str]:
    """Keys one by one; arrows and the like, which send several bytes, are left out."""
    while pressed := _read(terminal):
        if pressed.startswith(b"\x1b"):
            continue
        for letter in pressed.decode(errors="ignore"):
            if letter == "\x04":  # control and d, the end of input
                return
            yield letter.strip()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 64)
    except OSError:  # the terminal is gone
        return b""
