"""Command lines: config files, jax-flow's short names, and mistakes told in one line.

`--config=configs/NAME.py[:variant]` names a file, `--config.KEY=VALUE` changes a key. For short,
any flag not defined otherwise means a config key: `--batch_size 64` is `--config.batch_size=64`.
Where `--config` is left out, `--dataset_name NAME` picks `configs/NAME.py`. A key given on the
command line wins over every preset.
"""

import contextlib
import difflib
import functools
import pathlib
import re
import sys
import typing
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from utils import compilation

DEFAULT_CONFIG = "digits"
SIZE_KEYS = ("depth", "hidden_size", "patch_size", "num_heads")  # what `model.size` stands for
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


flags.disclaim_key_flags()  # --help of a script lists what it takes from here


class UserError(Exception):
    """A mistake of the user: shown as one line, without a traceback."""


def define_run_flags() -> tuple[flags.FlagHolder, flags.FlagHolder]:
    """Defines the flags of the training scripts, --config and --workdir."""
    config = config_flags.DEFINE_config_file(
        "config",
        help_string="configs/NAME.py[:variant]; --config.KEY=VALUE, or --KEY VALUE, changes a key.",
    )
    return config, flags.DEFINE_string(
        "workdir",
        "",
        "Folder of the run; default runs/DATASET/OBJECTIVE. gs://BUCKET/FOLDER is one too.",
    )


def define_flags(options: type) -> None:
    """Defines a flag per field of a NamedTuple; its docstring's Attributes say what each is for.

    Fields are bool, int, float, str, Literal, tuple[int | float | str, ...] (a list by commas), or
    Sequence[str] (the flag may be given several times). A field without a default is a str.
    """
    helps = _attributes(options.__doc__ or "")
    defaults: dict = options._field_defaults  # type: ignore[attr-defined]
    simple: dict[type, Callable] = {
        bool: flags.DEFINE_boolean,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    for name, kind in typing.get_type_hints(options).items():
        default, told = defaults.get(name, ""), helps[name]
        if kind in simple:
            simple[kind](name, default, told)
        elif typing.get_origin(kind) is typing.Literal:
            flags.DEFINE_enum(name, default, typing.get_args(kind), told)
        elif typing.get_origin(kind) is tuple:
            flags.DEFINE_list(name, [f"{x:g}" if x != str(x) else x for x in default], told)
        else:
            flags.DEFINE_multi_string(name, list(default), told)


def read_flags(options: type):
    """Returns the options as the command line gives them.

    Raises:
      UserError: a list of numbers that holds something else.
    """
    return options(
        **{
            name: _value(name, flags.FLAGS[name].value, kind)
            for name, kind in typing.get_type_hints(options).items()
        }
    )


def _value(name: str, value, kind):
    if typing.get_origin(kind) is not tuple:
        return value
    of = typing.get_args(kind)[0]
    try:
        return tuple(of(word.strip()) for word in value)
    except ValueError as error:
        raise UserError(f"--{name}={','.join(value)}: numbers, separated by commas") from error


def _attributes(doc: str) -> dict[str, str]:
    """The entries below "Attributes:" of a docstring, by name."""
    found = re.findall(
        r"^ +(\w+): (.*(?:\n {8}.*)*)", doc.partition("Attributes:")[2], re.MULTILINE
    )
    return {name: " ".join(text.split()) for name, text in found}


def run(main: Callable[[Sequence[str]], None], needed: str = "") -> None:
    """Parses the flags and calls `main(argv)`; a mistake ends in one line and exit status 2.

    Args:
      needed: what to give for --config, of a script that has none without.
    """
    from utils import hosts  # which imports this file

    def call(argv: Sequence[str]) -> None:
        compilation.keep()
        _told_in_one_line(lambda: hosts.ended(lambda: main(argv)))

    app.run(call, flags_parser=functools.partial(_parse, needed=needed))


def _told_in_one_line(call: Callable):
    try:
        return call()
    except (Exception, KeyboardInterrupt) as error:
        status = report(error)
        if status is None:
            raise
        sys.exit(status)


def report(error: BaseException) -> int | None:
    """Prints a mistake, or an interruption, in one line; returns the exit status, None for bugs."""
    if isinstance(error, UserError | flags.Error | OSError):  # a full disk is no bug of ours
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    return None


def printable(text: str) -> str:
    """A text in one line, safe to print: what files, folders and archives say is anyone's.

    Spaces and line ends become single spaces; what a terminal would obey, escapes and marks that
    turn the direction of writing among it, and bytes that are no text become "?".
    """
    text = " ".join(text.encode(errors="replace").decode().split())
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _parse(argv: Sequence[str], needed: str = "") -> list[str]:
    return _told_in_one_line(lambda: parse(list(argv), needed))


def parse(argv: list[str], needed: str = "") -> list[str]:
    """Parses `argv` into absl's flags and returns what is left, the program's name.

    Args:
      needed: as `run` takes it.
    Raises:
      UserError: no --config where it is needed, an unknown flag or key, a value of the wrong type,
        or a stray word.
    """
    given = {word.lstrip("-").partition("=")[0] for word in argv[1:]}
    if needed and not given & {"config", "help", "helpshort", "helpfull"}:
        raise UserError(f"give --config={needed}")
    if "config" in flags.FLAGS:
        argv = expand(argv, set(flags.FLAGS))
        check_keys(argv)
        sys.argv = argv  # config_flags reads overrides from there
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown(error.flagname, list(flags.FLAGS))) from error
    except SystemExit:  # --help, which is no failure
        sys.exit(0)
    if rest[1:]:
        raise UserError(f"stray word {rest[1]!r}: every option starts with --, see --help")
    if "config" in flags.FLAGS:
        unset_sizes(flags.FLAGS["config"].value, argv)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax reports some 20 lines a save
    return rest


def expand(argv: list[str], known: set[str]) -> list[str]:
    """Rewrites short names: `--KEY VALUE` becomes `--config.KEY=VALUE`, `--config` is filled in."""
    out, words = [argv[0]], argv[1:]
    while words:
        word = words.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        root = name.split(".")[0]
        is_key = name.startswith("config.") or not _is_flag(root, known)
        if not (word.startswith("--") and is_key):
            out.append(word)
            continue
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        flag = f"--config.{name.removeprefix('config.')}="
        # The last wins, as of other flags: config_flags would join the lists of both.
        out = [before for before in out if not before.startswith(flag)]
        out.append(f"{flag}{value}")
    if any(word.startswith("--config=") or word == "--config" for word in out):
        return out
    return [out[0], f"--config={_default_file(out)}", *out[1:]]


def unset_sizes(config: ConfigDict, argv: list[str]) -> None:
    """Lets a `model.size` given on the command line win over the sizes of a preset."""
    given = {word.partition("=")[0] for word in argv}
    if "--config.model.size" in given:
        for key in SIZE_KEYS:
            if f"--config.model.{key}" not in given:
                config.model[key] = None


def _is_flag(name: str, known: set[str]) -> bool:
    return name in known or name.removeprefix("no") in known


def _default_file(argv: list[str]) -> str:
    """The config file of the data set named on the command line, else the embedded default's."""
    prefix = "--config.dataset_name="
    names = [word.removeprefix(prefix) for word in argv if word.startswith(prefix)]
    for file in [f"{names[-1]}.py", f"toy.py:{names[-1]}"] if names else []:
        with contextlib.suppress(UserError):
            load_config(f"{CONFIGS}/{file}")
            return f"{CONFIGS}/{file}"
    return f"{CONFIGS}/{DEFAULT_CONFIG}.py"


def check_keys(argv: list[str]) -> None:
    """Names the nearest key where a config has none of the name given."""
    paths = [word.partition("=")[0] for word in argv if word.startswith("--config.")]
    keys = flatten(load_config(_value_of(argv, "--config")))
    groups = {key.rpartition(".")[0] for key in keys}
    for path in (path.removeprefix("--config.") for path in paths):
        if path not in keys and (path not in groups or not path):
            raise UserError(_unknown(path, [*keys, *flags.FLAGS]))


def _value_of(argv: list[str], flag: str) -> str:
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == flag or word.startswith(f"{flag}="):
            return word.partition("=")[2] or following
    raise UserError(f"{flag} is missing")


def _unknown(name: str, names: list[str]) -> str:
    """Says what was meant: a key of that section, else one with that last part, or spelt alike."""
    last = {n: n.rpartition(".")[2] for n in names}
    section, _, leaf = name.rpartition(".")
    own = {last[n]: n for n in names if section and n.startswith(f"{section}.")}
    near = [own[word] for word in difflib.get_close_matches(leaf, own)]
    same = [n for n in names if last[n] == leaf]
    if own and not near and len(same) != 1:  # of other sections it could be any
        return f"unknown flag or config key --{name}: {section} has {', '.join(own)}"
    alike = difflib.get_close_matches(leaf, last.values())
    near = near or difflib.get_close_matches(name, same) or same
    near = near or difflib.get_close_matches(name, names)
    near = near or [n for n in names if last[n] in alike]
    hint = f"did you mean --{near[0]}?" if near else "see --help and configs/base.py"
    return f"unknown flag or config key --{name}: {hint}"


def load_config(file: str) -> ConfigDict:
    """Returns the config of `FILE.py[:variant]`, without changes from the command line.

    Raises:
      UserError: no such file or variant.
    """
    values, argv = flags.FlagValues(), sys.argv
    path = pathlib.Path(str(file).partition(":")[0])
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("[!_]*.py") if p.stem != "base"))
        raise UserError(f"no config file {path}: there are configs/*.py for {known}")
    try:
        sys.argv = ["", f"--config={file}"]
        config_flags.DEFINE_config_file("config", flag_values=values)
        values(sys.argv)
        return values["config"].value
    except Exception as error:  # anything can stand in a file
        lines = str(error).split("\n")  # the library quotes a traceback; its last line tells
        told = [line for line in lines if line.strip()][-1].partition("Error: ")
        if "positional argument" in told[2]:
            raise UserError(f"{path} has no variants: leave out what follows .py") from error
        raise UserError(f"no config in {path}: {told[2] or told[0]}") from error
    finally:
        sys.argv = argv


def absolute(place: str) -> str:
    """A path as it is called from any folder; a name that is no path stays as it is."""
    path = pathlib.Path(place).expanduser()
    return str(path.absolute()) if place and path.exists() else place


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Returns {"model.depth": value, …}; lists become tuples, so that JSON compares equal."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat
