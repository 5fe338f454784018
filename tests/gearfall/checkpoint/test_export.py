"""From safetensors and back: every file byte for byte, whatever the ranks and dtypes."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch

from gearfall.checkpoint.directory import new_directory
from gearfall.checkpoint.export import export
from gearfall.checkpoint.reading import open_checkpoint
from gearfall.core.checkpoint.dtypes import DTYPE_BYTES, DTYPE_OF_SAFETENSORS
from gearfall.core.checkpoint.manifest import checksum
from gearfall.core.errors import Conflict, CorruptCheckpoint, InvalidRequest, Overloaded
from tests.gearfall.checkpoint.conversions import (
    GPT2,
    LLAMA,
    convert_source,
    gpt2_weights,
    llama_weights,
    save_source,
)
from tests.services.store.source_directories import Tensors, random_tensor, write_source

_QUANTISED = {"qint8", "quint8", "qint32", "quint4x2", "quint2x4"}


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def ignore(done_bytes: int, total_bytes: int) -> None:
    pass


def round_trip(source: Path, home: Path, ranks: int = 1) -> dict[str, bytes]:
    convert_source(source, home / "converted", ranks)
    (home / "out").mkdir()
    export(open_checkpoint(home / "converted"), home / "out", ignore)
    return contents(home / "out")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_llama_comes_back(tmp_path: Path, ranks: int, shards: int):
    source = save_source(tmp_path / "source", llama_weights(), LLAMA, shards=shards)
    assert round_trip(source, tmp_path, ranks) == contents(source)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_gpt2_comes_back(tmp_path: Path, ranks: int):
    source = save_source(tmp_path / "source", gpt2_weights(), GPT2)
    assert round_trip(source, tmp_path, ranks) == contents(source)


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_dtype_twins_and_empties_come_back(tmp_path: Path, ranks: int):
    tensors: Tensors = {
        f"x.{dtype}": random_tensor((6, 2), dtype=dtype)
        for dtype in DTYPE_OF_SAFETENSORS
        if dtype != "F4"
    }
    tensors |= {"packed": ("F4", (4, 6), bytes(range(12)))}
    tensors |= {"scalar": random_tensor(()), "empty": random_tensor((0, 4))}
    tensors |= {"twin": tensors["x.F32"], "model.embed_tokens.weight": random_tensor((16, 8))}
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    source = write_source(tmp_path / "source", tensors, metadata={"note": "\u00e9 \n kept"})
    assert round_trip(source, tmp_path, ranks) == contents(source)


def test_an_unusual_header_is_kept_to_the_byte(tmp_path: Path):
    source = write_source(tmp_path / "source")
    entry = '{"shape" : [4],\n "data_offsets":[0,  8], "dtype":"\\u0049\\u0031\\u0036", "own": 1}'
    text = f'  {{"b.weight": {entry}, "__metadata__":{{"z":"1","a":"2"}}}}   '.encode()
    content = struct.pack("<Q", len(text)) + text + bytes(range(8))
    (source / "model.safetensors").write_bytes(content)
    assert round_trip(source, tmp_path)["model.safetensors"] == content


def test_every_torch_dtype_has_its_size():
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        name = str(dtype).removeprefix("torch.")
        assert name in _QUANTISED or DTYPE_BYTES[name] == dtype.itemsize, name


def test_damage_is_named_and_nothing_is_written(tmp_path: Path):
    source = save_source(tmp_path / "source", llama_weights(), LLAMA)
    convert_source(source, tmp_path / "converted", 2)
    path = tmp_path / "converted/partition-1.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 128
    path.write_bytes(content)
    with (
        pytest.raises(CorruptCheckpoint, match=r"partition-1\.bin chunk 0"),
        new_directory(tmp_path / "out") as directory,
    ):
        export(open_checkpoint(tmp_path / "converted"), directory, ignore)
    assert {entry.name for entry in tmp_path.iterdir()} == {"source", "converted"}


def test_headers_that_speak_of_other_tensors_are_refused(tmp_path: Path):
    source = save_source(tmp_path / "source", llama_weights(), LLAMA)
    converted = convert_source(source, tmp_path / "converted").directory
    headers = converted / "source-headers.bin"
    for old, new in ((b"model.norm.weight", b"model.norn.weight"), (b"[16]", b"[4 ]")):
        changed = headers.read_bytes().replace(old, new)
        document = json.loads((converted / "manifest.json").read_text())
        (entry,) = (file for file in document["files"] if file["name"] == headers.name)
        entry["checksum"] = checksum(changed)
        other = tmp_path / f"other-{new.hex()}"
        other.mkdir()
        for file in converted.iterdir():
            os.link(file, other / file.name)
        for name, content in (
            (headers.name, changed),
            ("manifest.json", json.dumps(document).encode()),
        ):
            (other / name).unlink()
            (other / name).write_bytes(content)
        (tmp_path / f"out-{new.hex()}").mkdir()
        with pytest.raises(CorruptCheckpoint):
            export(open_checkpoint(other), tmp_path / f"out-{new.hex()}", ignore)


def test_without_headers_there_is_no_way_back(tmp_path: Path):
    source = save_source(tmp_path / "source", llama_weights(), LLAMA)
    converted = convert_source(source, tmp_path / "converted").directory
    document = json.loads((converted / "manifest.json").read_text())
    document["source_files"] = []
    document["files"] = [f for f in document["files"] if f["name"] != "source-headers.bin"]
    (converted / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(InvalidRequest, match="does not keep"):
        export(open_checkpoint(converted), tmp_path, ignore)


def test_a_directory_is_there_whole_or_not_at_all(tmp_path: Path):
    with new_directory(tmp_path / "new") as directory:
        (directory / "a").write_bytes(b"a")
        assert not (tmp_path / "new").exists()
    assert contents(tmp_path / "new") == {"a": b"a"}
    with pytest.raises(Conflict), new_directory(tmp_path / "new"):
        pass
    with pytest.raises(InvalidRequest), new_directory(tmp_path / "none/new"):
        pass
    with pytest.raises(Overloaded), new_directory(tmp_path / "other"):
        raise OSError(28, "No space left on device")
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]
