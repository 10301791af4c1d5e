"""Pickles of jax-flow, read without running what they say.

A pickle is a program: it names functions, and `pickle.load` calls them. Here a name finds one of
the stand-ins below or the file is refused. The stand-ins hold numbers: none imports, opens or calls
anything, and a stand-in is not what it stands for.
"""

import mmap
import pathlib
import pickle
from typing import IO, Any, ClassVar, cast

import ml_dtypes
import numpy as np

from utils.cli import UserError

DTYPES = {  # as numpy writes them, without the order of bytes
    **{name: np.dtype(name) for name in ("f2", "f4", "f8", "i4", "i8", "u4", "u8", "b1")},
    **{name: np.dtype(name) for name in ("i1", "i2", "u1", "u2")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


DEEPEST, MOST = 100, 200_000  # things in one another, and all


class Refused(pickle.UnpicklingError):
    """A pickle that asks for something else than numbers."""


class _Type:
    """A dtype: one of DTYPES, and its order of bytes."""

    dtype: np.dtype

    def __new__(cls, name: Any = None, *_: Any) -> "_Type":  # a pickle may leave __init__ out
        if not (isinstance(name, str) and name in DTYPES):
            told = repr(name[:40]) if isinstance(name, str) else type(name).__name__
            raise Refused(f"an array of type {told}")
        kind = super().__new__(cls)
        kind.dtype = DTYPES[name]
        return kind

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", "|", "="):
            raise Refused("an array of another order of bytes")


class _Array:
    """An array: __setstate__ receives what numpy's would."""

    value: np.ndarray = np.zeros(0, np.float32)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran is True else "C")


class _Bag:
    """Anything of which only what it holds matters: a state of Adam's, a config."""

    items: Any

    def __new__(cls, *items: Any) -> "_Bag":  # a pickle may leave __init__ out
        bag = super().__new__(cls)
        bag.items = items
        return bag

    def __setstate__(self, state: Any) -> None:
        self.items = state


def _array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not (isinstance(data, bytes | bytearray) and isinstance(dtype, _Type)):
        raise Refused("an array of objects")
    if not (isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)):
        raise Refused("an array without a shape")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return _array(data, dtype, shape, order)


def _scalar(dtype: Any, data: Any) -> np.ndarray:
    return _array(data, dtype, (), "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _jax_array(make: Any, _: Any, state: Any, *__: Any) -> np.ndarray:
    """What jax pickles: numpy's function, its arguments and its state."""
    if make is not _reconstruct:
        raise Refused("an array of jax that is made by another function")
    array = _Array()
    array.__setstate__(state)
    return array.value


def _mapping(content: Any = None) -> dict:
    """A FrozenDict's content, which is a dict already."""
    if not isinstance(content, dict):
        raise Refused("a FrozenDict of something else than a dict")
    return content


STAND_INS: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("ml_dtypes", "bfloat16"): "bfloat16",  # what _Type is given
    ("jax._src.array", "_reconstruct_array"): _jax_array,
    ("flax.core.frozen_dict", "FrozenDict"): _mapping,
    ("optax._src.transform", "ScaleByAdamState"): _Bag,
    ("optax._src.base", "EmptyState"): _Bag,
    ("ml_collections.config_dict.config_dict", "ConfigDict"): _Bag,
}


ORDINARY: Any = pickle._Unpickler.dispatch  # the number of an operation → what does it


class _Reader(pickle._Unpickler):
    """Finds stand-ins alone, fills those that hold something, and has words alone as keys.

    Python's reader and not C's, as joblib has it: single operations of it can be narrowed, and it
    allocates nothing for the numbers of slots and of bytes that a file merely states.
    """

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in; every other name is refused."""
        if (module, name) not in STAND_INS:
            raise Refused(f"it asks for {module}.{name}")
        return STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Refused: it would be looked for elsewhere."""
        raise Refused("it asks for something outside the file")

    def _build(self) -> None:
        # Else a state would go into what is found by name: into a function's defaults, for one.
        if type(self.stack[-2]) not in (_Type, _Array, _Bag):
            raise Refused("it asks for a change of what reads it")
        ORDINARY[pickle.BUILD[0]](self)

    def _set(self) -> None:
        _check_keys(self.stack[-2:-1])
        ORDINARY[pickle.SETITEM[0]](self)

    def _set_all(self) -> None:
        _check_keys(self.stack[::2])  # what follows the mark: keys and values by turns
        ORDINARY[pickle.SETITEMS[0]](self)

    def _dict(self) -> None:
        _check_keys(self.stack[::2])
        ORDINARY[pickle.DICT[0]](self)

    def _none(self) -> None:
        raise Refused("it holds a set, or an object of an old kind")

    dispatch: ClassVar[dict[int, Any]] = {
        **ORDINARY,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set,
        pickle.SETITEMS[0]: _set_all,
        pickle.DICT[0]: _dict,
        pickle.EMPTY_SET[0]: _none,
        pickle.FROZENSET[0]: _none,
        pickle.ADDITEMS[0]: _none,
        pickle.INST[0]: _none,
        pickle.OBJ[0]: _none,
    }


def _check_keys(keys: list[Any]) -> None:
    """Refuses keys that are no words: the hash of a tuple may take for ever.

    350 bytes are enough for a tuple that twice holds a tuple that twice holds …
    """
    if not all(type(key) is str for key in keys):
        raise Refused("it holds a dict whose keys are no words")


def load(path: pathlib.Path) -> Any:
    """Returns what the pickle holds: dicts, lists, numbers, words and numpy arrays.

    A ConfigDict comes as a dict; tuples, and states of optax, as lists.

    Raises:
      UserError: it is none, is damaged, or asks for anything but arrays.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _plain(_Reader(cast(IO[bytes], data)).load())
    except Refused as error:
        raise UserError(
            f"{path} is a pickle of more than arrays, {error}: reading it would run that, so it is "
            "refused"
        ) from error
    except Exception as error:  # what a damaged one raises is not limited to a kind
        raise UserError(
            f"{path} is no whole pickle ({type(error).__name__}: {error}): copy it again"
        ) from error


def _plain(value: Any, depth: int = 0, seen: list[int] | None = None) -> Any:
    """The stand-ins replaced by what they hold."""
    seen = [0] if seen is None else seen
    seen[0] += 1
    if depth > DEEPEST or seen[0] > MOST:  # a few bytes can hold themselves, or twice what is held
        raise Refused("it holds itself, or too much")
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, _Bag):
        held = value.items
        fields = held.get("_fields") if isinstance(held, dict) else None
        return _plain(held if fields is None else fields, depth + 1, seen)
    if isinstance(value, dict):
        return {key: _plain(item, depth + 1, seen) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item, depth + 1, seen) for item in value]
    if value is None or isinstance(value, np.ndarray | bool | int | float | str | bytes):
        return value
    raise Refused(f"it holds a {type(value).__name__}")
