"""Units and alert rules name what there is: flags that services take, metrics that they publish."""

import argparse
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from services.router.main import parse_settings as parse_router
from services.scheduler.main import parse_settings as parse_scheduler
from services.store.main import parse_flags as parse_store
from services.worker.main import parse_settings as parse_worker
from tests.docs.test_named_things import misnamed

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "deploy" / "systemd"
RULES = (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text()
GUIDE = (ROOT / "docs" / "operating.md").read_text()
Parse = Callable[[Sequence[str]], argparse.Namespace]
PARSERS: dict[str, Parse] = {
    "router": parse_router,
    "scheduler": parse_scheduler,
    "store": parse_store,
    "worker": parse_worker,
}


def settings_in(text: str) -> dict[str, str]:
    lines = (line for line in text.splitlines() if re.match(r"[A-Z_]+=", line))
    return dict(line.split("=", 1) for line in lines)


def entries(unit: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", unit, re.MULTILINE)


def command_of(unit: str, settings: dict[str, str], instance: str = "0") -> list[str]:
    """Return ExecStart as systemd runs it."""
    (line,) = entries(unit, "ExecStart")
    line = line.replace("%i", instance)
    return shlex.split(re.sub(r"\$\{(\w+)\}", lambda name: settings[name[1]], line))


@pytest.mark.parametrize("service", sorted(PARSERS))
def test_a_unit_starts_its_service_with_flags_that_it_takes(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = UNITS.glob(f"gearfall-{service}*.service")
    unit = path.read_text().replace("\\\n", " ")
    settings = settings_in("\n".join(entries(unit, "Environment")).replace("%i", "0"))
    for file in entries(unit, "EnvironmentFile"):
        settings |= settings_in((UNITS / Path(file).name).read_text())
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    _, dash_m, module, *flags = command_of(unit, settings)
    assert (dash_m, module) == ("-m", f"services.{service}")
    parsed = PARSERS[service](flags)
    assert parsed.listen.startswith(settings["ADDRESS"])
    assert parsed.etcd == settings["GEARFALL_ETCD"]


def test_every_setting_of_the_example_files_is_read_by_a_service(
    capsys: pytest.CaptureFixture[str],
) -> None:
    examples = "\n".join(path.read_text() for path in UNITS.glob("*.env"))
    variables = set(settings_in(examples.replace("\n# GEARFALL_", "\nGEARFALL_")))
    for parse in PARSERS.values():
        with pytest.raises(SystemExit):
            parse(["--help"])
    taken = set(re.findall(r"GEARFALL_\w+", capsys.readouterr().out))
    assert variables - taken == {"ADDRESS", "GEARFALL_CLUSTER_SECRET"}


def test_the_guide_puts_there_what_the_units_read() -> None:
    units = [path.read_text() for path in UNITS.glob("*.service")]
    wanted = {file for unit in units for file in entries(unit, "EnvironmentFile")}
    ((mode, files),) = re.findall(r"^install -m (\d+) (.*?) /etc/gearfall/ ", GUIDE, re.MULTILINE)
    assert mode == "0600", "passwords"
    assert {f"/etc/gearfall/{name}" for name in files.split()} == wanted


def test_services_may_read_the_pem_files_that_the_example_names() -> None:
    examples = (UNITS / "cluster.env").read_text()
    assert len(re.findall(r"=/etc/gearfall/.*(?:pem|key)$", examples, re.MULTILINE)) == 3
    users = {user for path in UNITS.glob("*.service") for user in entries(path.read_text(), "User")}
    ways = re.findall(r"install (?:-d )?-m (\d+) -g (\w+)", GUIDE)
    assert [mode for mode, _ in ways] == ["0750", "0640"]
    assert {group for _, group in ways} == users


@pytest.mark.parametrize("instance", ["0", "9"])
def test_a_worker_has_the_ports_that_the_guide_names(instance: str) -> None:
    unit = (UNITS / "gearfall-worker@.service").read_text().replace("\\\n", " ")
    flags = command_of(unit, {"ADDRESS": "host"}, instance)
    used = {int(flag.partition(":")[2]) for flag in flags if flag.startswith("host:")}
    (row,) = re.findall(r"^\| worker \| .* \| (\d.*?) \|", GUIDE, re.MULTILINE)
    first = re.findall(r"(\d+) to (\d+)", row)
    assert used == {int(span[int(instance) // 9]) for span in first}


def test_alert_rules_ask_for_metrics_that_there_are() -> None:
    names = set(re.findall(r"gearfall_\w+", RULES))
    assert len(names) >= 9
    assert not list(misnamed("".join(f"`{name}` " for name in names)))


def test_the_guide_says_what_to_do_about_each_alert() -> None:
    alerts = set(re.findall(r"alert: (\w+)", RULES))
    rows = re.findall(r"^\| (Gearfall\w+) .*\]\(#[\w-]+\) \|$", GUIDE, re.MULTILINE)
    assert set(rows) == alerts


def test_the_guide_leads_to_its_own_headings() -> None:
    headings = {
        heading.lower().replace(",", "").replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", GUIDE, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", GUIDE)) <= headings
