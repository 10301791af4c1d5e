"""The rules of ARCHITECTURE.md and of packaging, checked on the files as they are.

Each rule is a function from text to a list of complaints, so that the last tests can hand it text
that breaks it.
"""

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LIBRARY = ("flows", "models", "pipelines", "utils")
ROOMS = (*LIBRARY, "configs", "tests", "benchmarks", "scripts", "notebooks", ".ci")
# What a room may import of ours; rooms that are not named may import every room.
MAY_IMPORT = {
    "flows": {"flows"},
    "models": {"models"},
    "configs": {"configs"},
    "utils": {"utils"},
    "pipelines": {"pipelines", "utils", "models", "flows", "configs"},
}
ENTRY_POINTS = {path.stem for path in ROOT.glob("*.py")}
LONGEST_FUNCTION = 60  # lines
LONGEST_SCRIPT = 45  # lines of code

Sources = dict[str, str]  # path from the root → text


def texts(*suffixes: str) -> Sources:
    """Our text files with these suffixes, at the root and in the rooms; git need not be there."""
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()]
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(files)
        if path.suffix in suffixes
    }


def parsed(sources: Sources) -> Iterator[tuple[str, ast.Module]]:
    """The path and syntax tree of each source."""
    for path, text in sources.items():
        yield path, ast.parse(text, path)


# Imports


def imported(tree: ast.Module, path: str) -> set[str]:
    """The absolute names of all that a file imports, inside functions too."""
    names: set[str] = set()
    package = Path(path).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else ())))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def wrong_imports(sources: Sources, entry_points: set[str]) -> list[str]:
    """Imports against the directions of ARCHITECTURE.md."""
    complaints = []
    for path, tree in parsed(sources):
        room = path.split("/")[0]
        for name in sorted(imported(tree, path)):
            top = name.split(".")[0]
            if top in entry_points:
                complaints.append(f"{path} imports the entry point {top}")
            elif top in ROOMS and top not in MAY_IMPORT.get(room, ROOMS):
                complaints.append(f"{path} imports {name}")
    return complaints


def test_imports_point_one_way() -> None:
    assert wrong_imports(texts(".py"), ENTRY_POINTS) == []


# Sizes


def long_functions(sources: Sources) -> list[str]:
    """Functions of more than LONGEST_FUNCTION lines, docstring included."""
    return [
        f"{path}:{node.lineno} {node.name} has {size} lines"
        for path, tree in parsed(sources)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION
    ]


def lines_of_code(text: str) -> int:
    """Counts lines that are neither blank nor all comment nor part of a docstring."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    silent |= {tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_functions_are_short() -> None:
    assert long_functions(texts(".py")) == []


def test_entry_scripts_are_short() -> None:
    sizes = {path: lines_of_code(text) for path, text in texts(".py").items() if "/" not in path}
    assert {path: size for path, size in sizes.items() if size > LONGEST_SCRIPT} == {}


# Docstrings


def undocumented(sources: Sources) -> list[str]:
    """Modules, and in the library public functions and classes, that have no docstring."""
    complaints = []
    for path, tree in parsed(sources):
        if tree.body and ast.get_docstring(tree) is None:  # an empty __init__.py needs none
            complaints.append(path)
        if path.split("/")[0] in LIBRARY:
            complaints += [
                f"{path}:{node.lineno} {node.name}"
                for node in tree.body
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and ast.get_docstring(node) is None
            ]
    return complaints


def configs_without_command(sources: Sources) -> list[str]:
    """Config files whose docstring does not hold the command that runs them."""
    return [
        path
        for path, tree in parsed(sources)
        if "python train_" not in (doc := ast.get_docstring(tree) or "") or path not in doc
    ]


def test_public_names_are_documented() -> None:
    assert undocumented(texts(".py")) == []


def test_configs_open_with_their_command() -> None:
    not_a_run = {"configs/__init__.py", "configs/base.py"}  # base.py is the table of defaults
    configs = {path: text for path, text in texts(".py").items() if path.startswith("configs/")}
    runs = {path: text for path, text in configs.items() if path not in not_a_run}
    assert configs_without_command(runs) == []


# Packages


def pins(python: str) -> dict[str, str]:
    """Name → version that requirements.txt installs on this version of Python."""
    python_markers = {"python_version": python, "python_full_version": f"{python}.0"}
    requirements = map(Requirement, (ROOT / "requirements.txt").read_text().splitlines())
    found = {}
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate(python_markers):
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def direct_dependencies() -> list[Requirement]:
    """What pyproject.toml asks for by itself and by the extras that are pinned."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = [extras[name] for name in ("wandb", "tensorboard", "diffusers", "test")]
    return [Requirement(line) for line in sum(pinned, project["dependencies"])]


def not_pinned(wanted: list[Requirement], pinned: dict[str, str]) -> list[str]:
    """Dependencies without a pin, or with one outside their range."""
    versions = {str(want): pinned.get(canonicalize_name(want.name)) for want in wanted}
    return [
        f"{want}: {versions[str(want)]}"
        for want in wanted
        if (version := versions[str(want)]) is None
        or not want.specifier.contains(version, prereleases=True)
    ]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_dependencies_are_pinned_within_their_ranges(python: str) -> None:
    assert not_pinned(direct_dependencies(), pins(python)) == []


def test_conda_environment_equals_the_pins() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert "python=3.12" in environment["dependencies"]
    lines = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    conda = {canonicalize_name(name): version for name, version in (s.split("==") for s in lines)}
    pinned = pins("3.12")
    direct = {canonicalize_name(requirement.name) for requirement in direct_dependencies()}
    assert conda == {name: pinned[name] for name in direct}


# Text


def machine_paths(sources: Sources) -> list[str]:
    """Lines that name a place on somebody's machine."""
    place = re.compile(r"(?<![\w.$}/])/(?:root|work|home/\w+|Users/\w+|tmp/\w+)/")
    return [
        f"{path}:{number} {line.strip()}"
        for path, text in sources.items()
        for number, line in enumerate(text.splitlines(), 1)
        if place.search(line)
    ]


def test_no_file_names_a_place_on_a_machine() -> None:
    sources = texts("", ".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".sh", ".ipynb", ".slurm")
    assert machine_paths(sources) == []


def test_pins_name_no_registry() -> None:
    text = (ROOT / "requirements.txt").read_text()
    assert "//" not in text
    assert "--" not in text  # no pip options, such as an index or a folder of wheels


# The rules can fail


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("flows/path.py", "import utils.train"),
        ("models/dit.py", "from flows import path"),
        ("configs/digits.py", "from pipelines.build import network"),
        ("utils/train.py", "def fit():\n    from flows.objectives import mean_flow"),
        ("utils/data.py", "from ..models import dit"),
        ("pipelines/train.py", "from tests import conftest"),
        ("pipelines/sweep.py", "import train_flow"),
        ("train_meanflow.py", "from train_flow import main"),
        ("tests/test_flow.py", "import train_flow"),
    ],
)
def test_wrong_imports_are_found(path: str, text: str) -> None:
    assert len(wrong_imports({path: text}, {"train_flow"})) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("flows/objectives.py", "import jax\nfrom flows.path import velocity\nfrom . import times"),
        ("pipelines/train.py", "from configs import base\nfrom utils.train import fit"),
        ("train_flow.py", "from flows import objectives\nfrom pipelines import train"),
    ],
)
def test_right_imports_are_not_found(path: str, text: str) -> None:
    assert wrong_imports({path: text}, {"train_flow"}) == []


def test_long_functions_are_found() -> None:
    body = "    x = 1\n"
    assert long_functions({"a.py": "def f():\n" + body * (LONGEST_FUNCTION - 1)}) == []
    assert len(long_functions({"a.py": "def f():\n" + body * LONGEST_FUNCTION})) == 1


def test_only_code_is_counted() -> None:
    text = '"""Two\nlines."""\n\n# Why.\nx = """a\nb"""\n\n\n'
    text += 'def f():\n    """Doc."""\n    return (\n1)\n'
    assert lines_of_code(text) == 5


def test_missing_docstrings_are_found() -> None:
    sources = {
        "flows/a.py": "def f():\n    pass\n\nclass A:\n    pass\n\ndef _g():\n    pass\n",
        "flows/__init__.py": "",
        "tests/test_a.py": '"""Tests."""\n\ndef test_f():\n    pass\n',
    }
    assert undocumented(sources) == ["flows/a.py", "flows/a.py:1 f", "flows/a.py:4 A"]


def test_configs_without_their_command_are_found() -> None:
    command = '"""Digits.\n\n    python train_flow.py --config={}\n"""'
    sources = {
        "configs/a.py": command.format("configs/a.py"),
        "configs/b.py": command.format("configs/a.py"),
        "configs/c.py": '"""Trains."""',
    }
    assert configs_without_command(sources) == ["configs/b.py", "configs/c.py"]


def test_missing_and_wrong_pins_are_found() -> None:
    wanted = [Requirement("jax>=0.10.2,<0.13"), Requirement("ml_collections"), Requirement("tqdm")]
    found = not_pinned(wanted, {"jax": "0.13.0", "ml-collections": "1.1.0"})
    assert [line.split(":")[0] for line in found] == ["jax<0.13,>=0.10.2", "tqdm"]


def test_machine_paths_are_found() -> None:
    paths = ["/".join(["", *place, ""]) for place in (["root"], ["home", "me"], ["tmp", "w"])]
    assert len(machine_paths({"a.md": "\n".join(paths)})) == 3
    assert machine_paths({"a.md": "gs://bucket/work/runs $SCRATCH/work/runs flows/path.py"}) == []
