"""A Hugging Face directory as the source of a checkpoint: opened, checked, nothing executed.

What may be read: regular files directly in the directory. A symbolic link counts as the file it
leads to if that lies in the same directory, or in the `blobs` directory of the Hugging Face cache
that the directory is a snapshot of; any other link is refused. File descriptors stay open from the
check to the end of the conversion, so that what was checked is what is read.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gearfall.checkpoint.model_facts import read_facts
from gearfall.checkpoint.shard_index import INDEX_FILE, parse_shard_index
from gearfall.checkpoint.tensor_parallel import SplitRules, find_splits
from gearfall.core.checkpoint.manifest import AdapterFacts, ModelFacts
from gearfall.core.checkpoint.safetensors_header import (
    LENGTH_BYTES,
    SafetensorsHeader,
    SourceTensor,
    header_bytes,
    parse_header,
)
from gearfall.core.errors import Conflict, CorruptCheckpoint, InvalidRequest

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
SMALL_FILES_MAX_BYTES: dict[str, int] = {
    CONFIG_FILE: 2**20,
    GENERATION_CONFIG_FILE: 2**20,
    "tokenizer.json": 64 * 2**20,
    "tokenizer_config.json": 8 * 2**20,
    "special_tokens_map.json": 2**20,
    "chat_template.jinja": 2**20,
    INDEX_FILE: 32 * 2**20,
}
"""Files kept with a checkpoint, and the most that each may hold. Everything else stays behind."""

_SINGLE = "model.safetensors"
_MAX_HEADERS_BYTES = 32 * 2**20
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_SNAPSHOT = re.compile(r"[0-9a-f]{40}")


class _TokenizerConfig(msgspec.Struct):
    """All that is asked of tokenizer_config.json; the rest is skipped, not stored."""

    chat_template: msgspec.Raw = msgspec.Raw(b"")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One safetensors file, open for reading."""

    name: str
    fd: int
    status: os.stat_result
    header: SafetensorsHeader


@dataclass(frozen=True, slots=True)
class Source:
    """A directory that passed every check that needs no tensor byte."""

    path: Path
    files: tuple[SourceFile, ...]
    small_files: dict[str, bytes]
    facts: ModelFacts
    rules: SplitRules
    ties: dict[str, str]
    """Tensor names without bytes of their own, and the tensor that they share."""
    revision: str
    """Commit of a Hugging Face snapshot; empty where unknown."""
    adapter: AdapterFacts | None = None

    def tensors(self) -> dict[str, tuple[SourceFile, SourceTensor]]:
        """Every tensor by name, with the file that holds it."""
        return {
            tensor.name: (file, tensor) for file in self.files for tensor in file.header.tensors
        }

    def check_unchanged(self) -> None:
        """Raise Conflict if somebody wrote to a file since it was opened."""
        for file in self.files:
            now = os.fstat(file.fd)
            if (now.st_size, now.st_mtime_ns) != (file.status.st_size, file.status.st_mtime_ns):
                raise Conflict(f"{file.name} changed while it was registered")


@contextlib.contextmanager
def open_source(path_text: str) -> Iterator[Source]:
    """Check the directory and hold its files open.

    Raises InvalidRequest for what the caller must change, CorruptCheckpoint for broken files.
    """
    path = check_directory(path_text)
    with contextlib.ExitStack() as stack:
        small_files = read_small_files(path, SMALL_FILES_MAX_BYTES)
        if CONFIG_FILE not in small_files:
            raise InvalidRequest(f"{path} has no {CONFIG_FILE}", param="path")
        shard_of = _list_shards(path)
        if not shard_of:
            small_files.pop(INDEX_FILE, None)
        names = list(dict.fromkeys(shard_of.values())) or [_SINGLE]
        files = open_all(path, names, stack)
        tensors = _check_tensors(files, shard_of)
        facts = _facts(small_files, tensors)
        yield Source(
            path=path,
            files=files,
            small_files=small_files,
            facts=facts,
            rules=find_splits(facts, tensors),
            ties=_ties(files, tensors),
            revision=path.name if _blobs_of(path) else "",
        )


def check_directory(path_text: str) -> Path:
    """Return the real path of a source directory. Raises InvalidRequest if it is none."""
    path = Path(path_text)
    if not path_text or "\0" in path_text or not path.is_absolute():
        raise InvalidRequest("path must be an absolute path on the store's machine", param="path")
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InvalidRequest(f"{path_text[:200]} cannot be read: {error}", param="path") from None
    if not resolved.is_dir():
        raise InvalidRequest(f"{path_text} is not a directory", param="path")
    return resolved


def _list_shards(path: Path) -> dict[str, str]:
    """Shard of each tensor by the index; empty for a single file."""
    if os.path.lexists(path / _SINGLE):
        return {}
    if not os.path.lexists(path / INDEX_FILE):
        raise InvalidRequest(_explain_missing(path), param="path")
    return parse_shard_index(_read(path, INDEX_FILE, SMALL_FILES_MAX_BYTES[INDEX_FILE]))


def _explain_missing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{path} holds its weights as pickle only ({pickles[0]}), which can execute code and "
            "is never read: convert it to safetensors, for instance by loading it where you trust "
            "it and calling save_pretrained"
        )
    return f"{path} has neither {_SINGLE} nor {INDEX_FILE}"


def _open_regular(path: Path, name: str) -> tuple[int, os.stat_result]:
    """Open a file of the directory by the rule of this module; the caller closes it."""
    try:
        target = (path / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InvalidRequest(f"{name} cannot be read: {error}", param="path") from None
    if target.parent != path and target.parent != _blobs_of(path):
        raise InvalidRequest(f"{name} is a link that leaves its directory", param="path")
    try:
        # Without O_NONBLOCK a pipe would block the open.
        fd = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidRequest(f"{name} cannot be read: {error}", param="path") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise InvalidRequest(f"{name} is not a regular file", param="path")
    return fd, status


def _blobs_of(path: Path) -> Path | None:
    """Return the blob directory if `path` is a snapshot in a Hugging Face cache."""
    is_snapshot = (
        _SNAPSHOT.fullmatch(path.name) is not None
        and path.parent.name == "snapshots"
        and path.parent.parent.name.startswith("models--")
    )
    return path.parent.parent / "blobs" if is_snapshot else None


def read_small_files(path: Path, max_bytes_of: Mapping[str, int]) -> dict[str, bytes]:
    """Return the content of each of these files that is there and not empty."""
    return {
        name: text
        for name, max_bytes in max_bytes_of.items()
        if (text := _read(path, name, max_bytes))
    }


def _read(path: Path, name: str, max_bytes: int) -> bytes:
    if not os.path.lexists(path / name):
        return b""
    fd, status = _open_regular(path, name)
    with os.fdopen(fd, "rb") as file:
        if status.st_size > max_bytes:
            raise InvalidRequest(f"{name} is larger than {max_bytes} bytes", param="path")
        return file.read(max_bytes)


def open_all(
    path: Path, names: Sequence[str], stack: contextlib.ExitStack
) -> tuple[SourceFile, ...]:
    """Open safetensors files for as long as `stack` lives; their headers are checked."""
    files: list[SourceFile] = []
    left_bytes = _MAX_HEADERS_BYTES
    for name in names:
        files.append(_open_safetensors(path, name, left_bytes, stack))
        left_bytes -= files[-1].header.start_bytes
    return tuple(files)


def _open_safetensors(
    path: Path, name: str, max_header_bytes: int, stack: contextlib.ExitStack
) -> SourceFile:
    if not os.path.lexists(path / name):
        raise CorruptCheckpoint(f"{INDEX_FILE} names {name}, which is not there")
    fd, status = _open_regular(path, name)
    stack.callback(os.close, fd)
    try:
        size = header_bytes(os.pread(fd, LENGTH_BYTES, 0), status.st_size)
        if size + LENGTH_BYTES > max_header_bytes:
            raise InvalidRequest(
                f"the safetensors headers take more than {_MAX_HEADERS_BYTES} bytes", param="path"
            )
        header = parse_header(os.pread(fd, size, LENGTH_BYTES), status.st_size)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{name}: {error.message}") from None
    return SourceFile(name, fd, status, header)


def _check_tensors(files: tuple[SourceFile, ...], shard_of: dict[str, str]) -> list[SourceTensor]:
    home: dict[str, str] = {}
    for file in files:
        for tensor in file.header.tensors:
            if tensor.name in home:
                raise CorruptCheckpoint(f"tensor {tensor.name!r} is in two files")
            home[tensor.name] = file.name
    if not home:
        raise CorruptCheckpoint("the safetensors files hold no tensor")
    for name, shard in shard_of.items():
        if home.get(name) != shard:
            raise CorruptCheckpoint(f"{INDEX_FILE} says {name[:80]!r} is in {shard}: it is not")
    return [tensor for file in files for tensor in file.header.tensors]


def _ties(files: tuple[SourceFile, ...], tensors: list[SourceTensor]) -> dict[str, str]:
    """Ties that safetensors' save_model noted in the metadata: removed name -> kept name."""
    stored = {tensor.name for tensor in tensors}
    return {
        name: kept
        for file in files
        for name, kept in file.header.metadata.items()
        if kept in stored and name not in stored
    }


def _facts(small_files: dict[str, bytes], tensors: list[SourceTensor]) -> ModelFacts:
    return read_facts(
        decode_object(CONFIG_FILE, small_files[CONFIG_FILE]),
        decode_object(GENERATION_CONFIG_FILE, small_files.get(GENERATION_CONFIG_FILE, b"{}")),
        tensors,
        has_chat_template="chat_template.jinja" in small_files
        or _has_chat_template(small_files.get("tokenizer_config.json", b"{}")),
    )


def _has_chat_template(tokenizer_config: bytes) -> bool:
    try:
        found = msgspec.json.decode(tokenizer_config, type=_TokenizerConfig).chat_template
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"tokenizer_config.json does not decode: {error}") from None
    return bytes(found) not in (b"", b"null", b'""', b"[]", b"{}", b"false")


def decode_object(name: str, text: bytes) -> dict[str, Any]:
    """Decode a JSON object. Raises CorruptCheckpoint."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{name} does not decode: {error}") from None
