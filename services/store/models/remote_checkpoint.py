"""A converted checkpoint below a URL: its manifest and small files now, its chunks when needed."""

import asyncio
from dataclasses import dataclass

import numpy as np

from gearfall.core.checkpoint.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    checksum,
    manifest_digest,
    parse_manifest,
)
from gearfall.core.errors import CorruptCheckpoint
from gearfall.infra.net.remote import STALL_S, ObjectVersion, RemoteDirectory

MAX_SMALL_FILES_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class RemoteCheckpoint:
    """One version of a checkpoint: every later read is of these very objects, or fails."""

    remote: RemoteDirectory
    manifest: Manifest
    manifest_json: bytes
    digest: str
    versions: tuple[ObjectVersion, ...]
    """Of the partitions, in the manifest's order."""

    async def read_into(self, partition: int, offset_bytes: int, destination: memoryview) -> None:
        """Fill `destination` from a place in a partition; see `ByteSource`."""
        content = await self.remote.read_range(
            self.manifest.partitions[partition].file,
            offset_bytes,
            len(destination),
            self.versions[partition],
        )
        copying = asyncio.get_running_loop().run_in_executor(None, _copy, destination, content)
        try:
            await asyncio.shield(copying)
        except asyncio.CancelledError:
            # Whoever owns the memory may free it as soon as we are gone.
            await copying
            raise

    async def read_file(self, entry: FileEntry) -> bytes:
        """Return one small file, checked. Raises CorruptCheckpoint."""
        content = await self.remote.read_file(entry.name, entry.size_bytes)
        if len(content) != entry.size_bytes or checksum(content) != entry.checksum:
            raise CorruptCheckpoint(f"{self.remote.url}/{entry.name} is not what the manifest says")
        return content

    async def read_files(self) -> dict[str, bytes]:
        """Return every small file by name, checked. Raises CorruptCheckpoint."""
        files = self.manifest.files
        if sum(entry.size_bytes for entry in files) > MAX_SMALL_FILES_BYTES:
            raise CorruptCheckpoint(f"{self.remote.url} has small files that are not small")
        return {entry.name: await self.read_file(entry) for entry in files}

    async def close(self) -> None:
        """Nothing is held between reads."""


async def open_remote(url: str, *, stall_s: float = STALL_S) -> RemoteCheckpoint:
    """Read and check the manifest below a URL, and that every partition has the promised length.

    Raises InvalidRequest for a URL of no known kind, NotFound where no checkpoint is, Unavailable
    when the server can't be reached, CorruptCheckpoint for one that lies.
    """
    remote = RemoteDirectory(url.rstrip("/"), stall_s=stall_s)
    content = await remote.read_file(MANIFEST_FILE, MAX_MANIFEST_BYTES)
    manifest = await asyncio.to_thread(parse_manifest, content)
    versions = []
    for entry in manifest.partitions:
        version = await remote.stat(entry.file)
        if version.size_bytes != entry.size_bytes:
            raise CorruptCheckpoint(
                f"{url}/{entry.file} is {version.size_bytes} bytes by the server's word, "
                f"{entry.size_bytes} by the manifest's"
            )
        versions.append(version)
    return RemoteCheckpoint(remote, manifest, content, manifest_digest(content), tuple(versions))


def _copy(destination: memoryview, content: memoryview) -> None:
    # Without the interpreter lock, unlike an assignment: fresh pool memory is slow to touch.
    np.copyto(np.frombuffer(destination, np.uint8), np.frombuffer(content, np.uint8))
