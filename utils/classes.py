"""Names of classes: ImageNet's, and the class that a word on a command line means."""

import difflib
import functools
import pathlib
import re
from collections.abc import Iterable, Sequence

from utils.cli import UserError

_IMAGENET = pathlib.Path(__file__).with_name("imagenet_classes.txt")
# Two pairs of ImageNet's classes share a first word; the synsets' definitions tell them apart.
_APART = {134: "crane (bird)", 517: "crane (machine)", 639: "maillot (tank suit)"}
_SHOWN = 6  # classes that a message names
Words = Sequence[Sequence[str]]  # of each class, all that it is called


@functools.cache
def _table() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """WordNet's identifier and words of the 1000 classes, in the order of labels."""
    lines = _IMAGENET.read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines if not line.startswith("#"))
    return tuple((identifier, tuple(words.split(", "))) for identifier, words in rows)


def imagenet() -> tuple[str, ...]:
    """The names of ImageNet's 1000 classes, all different; 207 is "golden retriever".

    They are the first words of WordNet's synsets, but for three that another class has too: "crane"
    twice and "maillot" twice. The source is named in imagenet_classes.txt.
    """
    return tuple(_APART.get(label, words[0]) for label, (_, words) in enumerate(_table()))


def imagenet_words() -> Words:
    """All words of ImageNet's classes, as ("tench", "Tinca tinca") of class 0."""
    return tuple((_APART[i], *w) if i in _APART else w for i, (_, w) in enumerate(_table()))


def readable(names: Iterable[str]) -> tuple[str, ...]:
    """Class names as people say them: WordNet's identifiers, as "n02099601", are looked up.

    Where one of them is none of ImageNet's 1000 classes, as in part of ImageNet-21k, it stays.
    """
    known = {identifier: name for (identifier, _), name in zip(_table(), imagenet(), strict=True)}
    return tuple(known.get(name, name) for name in names)


def find(word: str, names: Sequence[str], words: Words = ()) -> int:
    """The class that a word means: its number, its name, or what else it is called.

    Case, and whether spaces are written "_" or "-", matter only where classes differ by it alone.

    Args:
      names: of all classes.
      words: more that each is called; empty: nothing more.
    Raises:
      UserError: no class of that number or name, with the nearest; or several.
    """
    if re.fullmatch(r"-?\d+", word):
        if not 0 <= int(word) < len(names):
            raise UserError(f"no class {word}: there are 0 to {len(names) - 1}")
        return int(word)
    called = [
        tuple(dict.fromkeys((name, *more)))
        for name, more in zip(names, words or [()] * len(names), strict=True)
    ]
    for law in (lambda text: text, _plain):
        for first in (True, False):  # a class's own name before what else others are called
            found = [
                i
                for i, own in enumerate(called)
                if law(word) in map(law, own[:1] if first else own)
            ]
            if len(found) == 1:
                return found[0]
            if found:
                raise UserError(f"{word!r} is {_list(found, names)}: give the number")
    raise UserError(_unknown(word, names, called))


def _plain(text: str) -> str:
    return " ".join(re.split(r"[\s_-]+", text.casefold().strip()))


def _list(labels: Sequence[int], names: Sequence[str]) -> str:
    """Some classes by name and number, for a message."""
    more = f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
    return ", ".join(f"{names[i]} ({i})" for i in labels[:_SHOWN]) + more


def _unknown(word: str, names: Sequence[str], called: Words) -> str:
    holders = {_plain(one): i for i, own in reversed(list(enumerate(called))) for one in own}
    near = difflib.get_close_matches(_plain(word), holders, n=1, cutoff=0.75)
    if near:
        return f"no class {word!r}: did you mean {_list([holders[near[0]]], names)}?"
    parts = sorted({i for one, i in holders.items() if _plain(word) and _plain(word) in one})
    if parts:
        return f"no class {word!r}: there are {_list(parts, names)}"
    return f"no class {word!r}: there are {_list(range(len(names)), names)}"
