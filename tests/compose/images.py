"""The images that the compose tests run, and the base that they are built on."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from tests.compose.docker_engine import MissingError

ROOT = Path(__file__).parents[2]
BASE_VARIABLE = "GEARFALL_BASE_IMAGE"
SERVICE_IMAGE = "gearfall-test/gearfall"
SERVERS_IMAGE = "gearfall-test/servers"
_OFFICIAL_BASE = "python:3.11-slim"
_DEBIAN_BASE = "gearfall-test/debian-python"
_BUILD_BASE = "gearfall-test/build-base"
_DEBIAN_PACKAGES = "python3,python3-venv,ca-certificates,tini,etcd-server,etcd-client,redis-server"
_PULL_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class PipSettings:
    """Where this machine's pip gets packages: what a build in a container has to know too."""

    certificates: Path | None
    folders: tuple[Path, ...]
    """Directories of wheels."""
    variables: Mapping[str, str]
    """Settings that need no files, as environment."""

    @property
    def is_plain(self) -> bool:
        """Whether pip is left as it comes."""
        return not (self.certificates or self.folders or self.variables)


class Docker:
    """The client, led to one engine; builds give way to whoever else uses the machine."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = {**os.environ, **environment}

    def run(self, *arguments: str, stdin: IO[bytes] | None = None) -> None:
        """Run a command with its output shown. Raises CalledProcessError when it fails."""
        argv = ["nice", "-n", "10", "docker", *arguments]
        subprocess.run(argv, env=self._environment, check=True, cwd=ROOT, stdin=stdin)

    def succeeds(self, *arguments: str) -> bool:
        """Whether a command ends well, in silence and in time."""
        try:
            ran = subprocess.run(
                ["docker", *arguments],
                env=self._environment,
                capture_output=True,
                timeout=_PULL_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return ran.returncode == 0


def has_images(environment: Mapping[str, str]) -> bool:
    """Whether the engine that `environment` leads to has both, though maybe of older code."""
    return Docker(environment).succeeds("image", "inspect", SERVERS_IMAGE, SERVICE_IMAGE)


def build_images(environment: Mapping[str, str], *, keep_stages: bool) -> None:
    """Build both images in the engine that `environment` leads to.

    With `keep_stages`, what they were built in stays for the next build: more than they take.

    Raises MissingError when there is no base to build on, CalledProcessError when a build fails.
    """
    docker = Docker(environment)
    base = _find_base(docker)
    build_base = _build_base(docker, base, read_pip_settings())
    arguments = {"BASE_IMAGE": base, "BUILD_IMAGE": build_base, "TORCH": _torch()}
    for target, name in (("servers", SERVERS_IMAGE), ("run", SERVICE_IMAGE)):
        flags = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        file = ("--file", "deploy/compose/Dockerfile")
        docker.run("build", "--quiet", *file, "--target", target, "--tag", name, *flags, ".")
    if not keep_stages:
        if build_base != base:
            docker.run("image", "rm", build_base)
        docker.run("image", "prune", "--force")


def read_pip_settings(listing: str | None = None) -> PipSettings:
    """Read `pip config list`, or a listing of it: `global.cert='/path'`, one a line."""
    if listing is None:
        argv = [sys.executable, "-m", "pip", "config", "list"]
        listing = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    certificates: Path | None = None
    folders: list[Path] = []
    variables: dict[str, str] = {}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        name, words = key.rpartition(".")[2], value.strip("'\"").split()
        addresses = [word for word in words if word.startswith("http")]
        if name == "cert":
            certificates = Path(words[0])
        elif name == "find-links":
            folders += [Path(word) for word in words if word.startswith("/")]
        elif name in {"index-url", "extra-index-url"} and addresses:
            variables[f"PIP_{name.replace('-', '_').upper()}"] = " ".join(addresses)
    return PipSettings(certificates, tuple(dict.fromkeys(folders)), variables)


def _find_base(docker: Docker) -> str:
    """Return the base that is named, else the official one, else Debian made here."""
    if named := os.environ.get(BASE_VARIABLE):
        return named
    if docker.succeeds("image", "inspect", _OFFICIAL_BASE) or docker.succeeds(
        "pull", _OFFICIAL_BASE
    ):
        return _OFFICIAL_BASE
    if not docker.succeeds("image", "inspect", _DEBIAN_BASE):
        _import_debian(docker)
    return _DEBIAN_BASE


def _import_debian(docker: Docker) -> None:
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        raise MissingError(
            f"a base image: {_OFFICIAL_BASE} can't be pulled, {BASE_VARIABLE} names no other, and "
            "there is no debootstrap, run by root, to make one"
        )
    with TemporaryDirectory(prefix="gearfall-base-") as directory:
        root = Path(directory, "root")
        include = f"--include={_DEBIAN_PACKAGES}"
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", include, "bookworm", str(root)],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode != 0:
            raise MissingError(f"a base image: debootstrap said {made.stdout[-300:]}")
        # What was downloaded has been unpacked, and would be in every image built on this one.
        without = [f"--exclude=./{place}/*" for place in ("var/cache/apt", "var/lib/apt/lists")]
        archive = ["tar", "-C", str(root), *without, "-c", "."]
        with subprocess.Popen(archive, stdout=subprocess.PIPE) as packing:
            docker.run("import", "-", _DEBIAN_BASE, stdin=packing.stdout)
        if packing.returncode != 0:
            raise subprocess.CalledProcessError(packing.returncode, archive)


def _build_base(docker: Docker, base: str, pip: PipSettings) -> str:
    """Return `base`, or a child of it that has this machine's pip settings and a compiler."""
    if pip.is_plain:
        return base
    with TemporaryDirectory(prefix="gearfall-build-base-") as directory:
        context = Path(directory)
        lines = [f"FROM {base}"]
        variables = dict(pip.variables)
        if pip.certificates is not None:
            shutil.copy(pip.certificates, context / "certificates.pem")
            lines.append("COPY certificates.pem /opt/host/")
            variables["PIP_CERT"] = "/opt/host/certificates.pem"
        for number, folder in enumerate(pip.folders):
            shutil.copytree(folder, context / f"wheels-{number}")
            lines.append(f"COPY wheels-{number} /opt/host/wheels-{number}")
        if pip.folders:
            found = (f"/opt/host/wheels-{number}" for number in range(len(pip.folders)))
            variables["PIP_FIND_LINKS"] = " ".join(found)
        lines += [f'ENV {name}="{value}"' for name, value in variables.items()]
        # Here, so that a change of gearfall does not fetch it again.
        lines.append(
            "RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev"
            " && apt-get clean && rm -rf /var/lib/apt/lists/*"
        )
        (context / "Dockerfile").write_text("\n".join(lines) + "\n")
        docker.run("build", "--quiet", "--tag", _BUILD_BASE, str(context))
    return _BUILD_BASE


def _torch() -> str:
    """Return what to ask pip for: this environment's own version, without its build's tag."""
    return f"torch=={version('torch').partition('+')[0]}"
