"""The peers' processes: transformers in this environment, the others in ones of their own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.engine.work import Work

HERE = Path(__file__).parent
LLAMA_CPP = ("gguf", "numpy", "llama-cpp-python")


@dataclass(frozen=True, slots=True)
class PeerKind:
    """How a peer is run; `ways` are tried, the fastest is measured."""

    name: str
    command: tuple[str, ...]
    ways: tuple[str, ...]


TRANSFORMERS = (sys.executable, "-m", "bench.engine.transformers_peer")
GENERATE = PeerKind("generate", TRANSFORMERS, ("static bf16", "sorted bf16", "static f32"))
CONTINUOUS = PeerKind("continuous", TRANSFORMERS, ("continuous bf16", "continuous f32"))


class PeerProcess:
    """One peer, alive from round to round, idle between them."""

    def __init__(self, kind: PeerKind, source: Path, threads: int, log: Path) -> None:
        self.kind = kind
        self.version = ""
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [*kind.command, str(source), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=HERE.parents[1],
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                process_group=0,
            )

    def warm(self, way: str) -> None:
        """Load what a way needs and run it once. Raises RuntimeError when the peer can't."""
        self.version = str(self._ask({"warm": way})["version"])

    def run(self, way: str, work: Work) -> tuple[float, list[int]]:
        """Answer all requests; return the peer's seconds and the first token of each answer.

        Raises RuntimeError when the peer is gone.
        """
        requests = [(request.prompt, request.answer_tokens) for request in work.requests]
        reply = self._ask({"way": way, "batch": work.batch, "requests": requests})
        return float(reply["seconds"]), [int(token) for token in reply["first_tokens"]]

    def stop(self) -> None:
        """End the process and all that it started: vLLM's own outlive it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died before it was asked
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _ask(self, request: dict[str, object]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.kind.name} ended with status {self._process.wait()}")
        return json.loads(line)


def llama_cpp(venv: Path) -> tuple[PeerKind | None, str]:
    """Return llama.cpp's peer, built from its package's source if absent, or None and why not."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    if not any(venv.glob("lib/python*/site-packages/llama_cpp_python-*.dist-info")):
        pip = (sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check")
        done = subprocess.run(
            [*pip, "install", "--quiet", *LLAMA_CPP], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            return None, (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    command = (str(python), "-P", str(HERE / "llama_cpp_peer.py"))
    return PeerKind("llama.cpp", command, ("bf16", "f16")), ""


def vllm(python: Path) -> PeerKind:
    """Return vLLM's peer, run by an interpreter that has vLLM."""
    command = (str(python), "-P", str(HERE / "vllm_peer.py"))
    return PeerKind("vllm", command, ("eager", "compiled"))


def start_peers(
    kinds: Sequence[PeerKind], source: Path, threads: int, log: Path
) -> tuple[list[PeerProcess], dict[str, str]]:
    """Start and warm peers; return those that can run, and why the others can't."""
    peers, missing = [], {}
    for kind in kinds:
        peer = PeerProcess(kind, source, threads, log)
        try:
            for way in kind.ways:
                peer.warm(way)
        except RuntimeError as error:
            missing[kind.name] = f"{error}; see {log.name}"
            peer.stop()
            continue
        peers.append(peer)
    return peers, missing
