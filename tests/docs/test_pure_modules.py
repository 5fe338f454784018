"""Modules that call themselves pure are held to it by the import rules, which name no others."""

import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTRACT = "Pure modules touch neither the world nor the clock"


def pure_by_rule() -> list[str]:
    """Return the modules that the contract names; `**` stands for any packages."""
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (each for each in rules["contracts"] if each["name"] == CONTRACT)
    return [str(name) for name in contract["source_modules"]]


def modules() -> dict[str, Path]:
    """Return the files of what is shipped, by module name; a package is its folder's name."""
    files = (path for top in ("gearfall", "services") for path in (ROOT / top).rglob("*.py"))
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def is_meant(rule: str, module: str) -> bool:
    top, _, name = rule.partition(".**.")
    return f"{module}.".startswith(f"{top}.") and (not name or module.endswith(f".{name}"))


def unmatched(modules: Iterable[str], rules: Iterable[str]) -> tuple[set[str], set[str]]:
    """Return the modules that no rule means, and the rules that mean no module."""
    pairs = {(rule, name) for rule in rules for name in modules if is_meant(rule, name)}
    meant, used = {name for _, name in pairs}, {rule for rule, _ in pairs}
    return set(modules) - meant, set(rules) - used


def test_who_says_pure_is_held_to_it():
    heads = {name: path.read_text().split('"""')[1:2] for name, path in modules().items()}
    claims = [name for name, head in heads.items() if "Pure." in "".join(head)]
    assert claims, "nobody says it"
    assert unmatched(claims, pure_by_rule())[0] == set()


def test_the_rules_name_modules_that_are_there():
    assert unmatched(modules(), pure_by_rule())[1] == set()


def test_what_no_rule_means_is_found():
    assert unmatched(["a.b.c", "a.d"], ["a.**.c"]) == ({"a.d"}, set())
    assert unmatched(["a.b.c", "a.d"], ["a.b", "a.**.e"]) == ({"a.d"}, {"a.**.e"})
