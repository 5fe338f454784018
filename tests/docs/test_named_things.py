"""What the documents name exists: files, modules, commands, flags, targets, variables, metrics."""

import fnmatch
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import typer.main
from typer.core import TyperCommand, TyperGroup

from gearfall.cli.main import app

Command = TyperCommand | TyperGroup
ROOT = Path(__file__).parents[2]
FOLDERS = ("bench", "cuda_ext", "deploy", "docs", "gearfall", "protos", "services", "tests")
DOCUMENTS = [
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.md"))
    if path.name != "CHANGELOG.md"  # which may name what has gone
]
OTHERS = {"llama.cpp", "gearfall_etcd"}.union(
    ("--entrypoint", "--no-cache", "--no-deps", "--profile", "--reference", "--rm", "--scale"),
    ("--constraint", "--endpoints", "--now"),
)
"""Another project, a volume, and flags of other programs that the documents call."""
WRITTEN = ("bench/results/", "deploy/compose/.env")
"""What running something makes."""

_MODULE = re.compile(rf"(?:{'|'.join(FOLDERS)})\.[\w.]+")
_CODE = re.compile(r"^```.*?^```|`[^`]+`|\]\([^)#\s]+\)", re.MULTILINE | re.DOTALL)
_FILE = re.compile(rf"[\w./*-]+\.(?:py|md|cpp|hpp|cu|sh)|(?:{'|'.join(FOLDERS)})/[\w./*-]*")


def misnamed(text: str, directory: Path = ROOT) -> Iterator[str]:
    """Return what a document in `directory` names as code and is not there."""
    return (name for name in _misnamed(text, directory) if name not in OTHERS)


def _misnamed(text: str, directory: Path) -> Iterator[str]:
    for code in (found[0].strip("`]()") for found in _CODE.finditer(text)):
        words = [word.strip("(),;:'\"") for word in code.split()]
        files = (word for word in words if _FILE.fullmatch(word))
        yield from (file for file in files if not _is_file(file, directory))
        yield from (name for name in re.findall(r"GEARFALL_\w+", code) if name not in _words())
        yield from (name for name in re.findall(r"gearfall_\w+", code) if not _is_metric(name))
        flags = (word.partition("=")[0] for word in words if word.startswith("--"))
        yield from (flag for flag in flags if not _is_flag(flag))
        for line in code.replace("\\\n", " ").splitlines():
            yield from _misnamed_run(line.split())


def _misnamed_run(words: list[str]) -> Iterator[str]:
    """Yield what a command line runs that is not there."""
    for program, *rest in (words[at:] for at in range(len(words) - 1)):
        if program == "make" and words[0] == "make" and f"\n{rest[0]}:" not in _makefile():
            yield f"make {rest[0]}"
        if program == "-m" and _MODULE.fullmatch(rest[0]) and not _is_module(*rest[:2]):
            yield f"-m {' '.join(rest[:2])}"
        if program.endswith("gearfall") and (wrong := _wrong_option(rest)):
            yield f"gearfall {wrong}"


def _wrong_option(words: list[str]) -> str:
    """Return the word that no command of gearfall knows, empty if it knows them."""
    command = _gearfall()
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        name, *words = words
        if not re.fullmatch(r"[a-z-]+", name):
            return ""
        if name not in command.commands:
            return name
        command = cast("Command", command.commands[name])
    known = _flags_of(command)
    flags = (word.partition("=")[0] for word in words if word.startswith("--"))
    return next((flag for flag in flags if flag not in known), "")


def _gearfall() -> Command:
    return cast("TyperGroup", typer.main.get_command(app))


def _flags_of(command: Command) -> set[str]:
    return {"--help"}.union(*(each.opts + each.secondary_opts for each in command.params))


@functools.cache
def _flags() -> set[str]:
    """Return the flags of all of gearfall's commands."""
    found, commands = set[str](), [_gearfall()]
    while commands:
        command = commands.pop()
        found |= _flags_of(command)
        if isinstance(command, TyperGroup):
            commands += cast("list[Command]", [*command.commands.values()])
    return found


@functools.cache
def _files() -> set[str]:
    """Return every file and folder from the root, and by every end of its path."""
    inside = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    parts = [path.relative_to(ROOT).parts for path in (*ROOT.iterdir(), *inside)]
    return {"/".join(each[at:]) for each in parts for at in range(len(each))}


@functools.cache
def _sources() -> str:
    kinds = ("py", "cpp", "hpp", "sh", "yml", "js")
    paths = (path for top in FOLDERS for kind in kinds for path in (ROOT / top).rglob(f"*.{kind}"))
    return "\n".join(path.read_text() for path in paths if path != Path(__file__)) + _makefile()


@functools.cache
def _words() -> set[str]:
    """Return every name in the sources, and every flag as a quotation begins with it."""
    return set(re.findall(r"\w+|(?<=\")--[\w-]+", _sources()))


@functools.cache
def _makefile() -> str:
    return (ROOT / "Makefile").read_text()


def _is_file(name: str, directory: Path) -> bool:
    if name.startswith(WRITTEN) or (directory / name).exists():
        return True
    return name.rstrip("/") in _files() or ("*" in name and bool(fnmatch.filter(_files(), name)))


def _is_module(name: str, inside: str = "") -> bool:
    module = ROOT / name.replace(".", "/")
    if re.fullmatch("[a-z][a-z_-]*", inside) and name in {"bench.cascade", "bench.scheduler"}:
        return _has(module / f"{inside.replace('-', '_')}.py", "\ndef main(")
    runs = '\nif __name__ == "__main__":'
    return _has(module.with_suffix(".py"), runs) or (module / "__main__.py").exists()


def _has(path: Path, line: str) -> bool:
    return path.exists() and line in path.read_text()


def _is_metric(name: str) -> bool:
    return not {name, re.sub("_(total|bucket|sum|count)$", "", name)}.isdisjoint(_words())


def _is_flag(flag: str) -> bool:
    return flag in _flags() or flag in _words()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_what_there_is(path: Path):
    assert list(misnamed(path.read_text(), path.parent)) == []


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("services/router/none.py", "services/router/none.py"),
        ("none*.py", "none*.py"),
        ("python -m bench.none --rounds 3", "-m bench.none --rounds"),
        ("python -m bench.scheduler none", "-m bench.scheduler none"),
        ("python -m bench.scheduler start_errors", "-m bench.scheduler start_errors"),
        ("python -m bench.start.run", "-m bench.start.run"),
        ("gearfall none", "gearfall none"),
        ("gearfall demo none", "gearfall none"),
        ("gearfall ps --rounds 3", "gearfall --rounds"),
        ("--none-such", "--none-such"),
        ("--round", "--round"),
        ("make none", "make none"),
        ("GEARFALL_NONE", "GEARFALL_NONE"),
        ("GEARFALL_REDI", "GEARFALL_REDI"),
        ("gearfall_none_total", "gearfall_none_total"),
        ("gearfall_request", "gearfall_request"),
    ],
)
def test_a_name_of_nothing_is_found(code: str, wrong: str):
    for text in (f"before `{code}` after", f"before\n```sh\n{code}\n```\nafter"):
        assert wrong in misnamed(text)


def test_a_link_to_nothing_is_found():
    assert list(misnamed("[here](docs/none.md) and [there](docs/plan.md)")) == ["docs/none.md"]
