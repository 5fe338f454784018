"""One loader in a process of its own: `python peer.py LOADER PATH`, in the peers' environment.

Speaks lines of JSON with `bench.load`: says that it is ready once everything is imported, waits for
a line, loads, touches every page, and says what it took. It imports nothing of gearfall.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
READERS = 4
PAGE_BYTES = 4096
_KEPT: list[Any] = []
"""What owns the tensors' memory."""


def load_file(path: Path) -> Tensors:
    """Safetensors, one file."""
    from safetensors.torch import load_file as load

    return load(path / "model.safetensors")


def safe_open(path: Path) -> Tensors:
    """Safetensors, tensor by tensor."""
    from safetensors import safe_open as opened

    with opened(path / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def from_pretrained(path: Path) -> Tensors:
    """Load transformers' whole model, in its stored dtype."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
    _KEPT.append(model)
    return dict(model.named_parameters())


def torch_load(path: Path) -> Tensors:
    """torch.load of torch.save's file."""
    return dict(torch.load(path / "model.pt", weights_only=True))


def torch_load_mmap(path: Path) -> Tensors:
    """torch.load, mapped."""
    return dict(torch.load(path / "model.pt", weights_only=True, mmap=True))


def runai(path: Path) -> Tensors:
    """run:ai model streamer, as it chooses by itself."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path / "model.safetensors"))
        return dict(streamer.get_tensors())


def runai_buffered(path: Path) -> Tensors:
    """run:ai model streamer through the page cache."""
    os.environ["RUNAI_STREAMER_FS_STRATEGY"] = "io_uring_buffered"
    return runai(path)


def fastsafetensors(path: Path) -> Tensors:
    """fastsafetensors on the CPU."""
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(None, device="cpu", nogds=True, max_threads=READERS)
    loader.add_filenames({0: [str(path / "model.safetensors")]})
    buffer = loader.copy_files_to_device()
    _KEPT.extend((loader, buffer))
    return {name: buffer.get_tensor(name) for name in loader.get_keys()}


def tensorizer(path: Path) -> Tensors:
    """tensorizer, several readers."""
    from tensorizer import TensorDeserializer

    found = TensorDeserializer(str(path / "model.tensors"), device="cpu", num_readers=READERS)
    _KEPT.append(found)
    return dict(found.items())


LOADERS: dict[str, Callable[[Path], Tensors]] = {
    "safetensors load_file": load_file,
    "safetensors safe_open": safe_open,
    "transformers from_pretrained": from_pretrained,
    "torch.load": torch_load,
    "torch.load mmap": torch_load_mmap,
    "run:ai streamer": runai,
    "run:ai streamer buffered": runai_buffered,
    "fastsafetensors": fastsafetensors,
    "tensorizer": tensorizer,
}
IMPORTS = {
    "transformers from_pretrained": "transformers.models.llama.modeling_llama",
    "run:ai streamer": "runai_model_streamer",
    "run:ai streamer buffered": "runai_model_streamer",
    "fastsafetensors": "fastsafetensors",
    "tensorizer": "tensorizer",
}


def write_variants(path: Path) -> None:
    """Write the model for the loaders that have a format of their own."""
    tensors = load_file(path)
    if not (path / "model.pt").exists():
        torch.save(tensors, path / "model.pt.incoming")
        (path / "model.pt.incoming").rename(path / "model.pt")
    if not (path / "model.tensors").exists():
        try:
            from tensorizer import TensorSerializer
        except ImportError:
            return
        serializer = TensorSerializer(str(path / "model.tensors.incoming"))
        serializer.write_state_dict(tensors)
        serializer.close()
        (path / "model.tensors.incoming").rename(path / "model.tensors")


def touch(tensors: Tensors) -> int:
    """Read a byte of every page; lazily mapped bytes become resident here, inside the time."""
    total = 0
    for tensor in tensors.values():
        total += int(bytes_of(tensor)[::PAGE_BYTES].sum())
    return total


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, flat."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def digest(tensors: Tensors) -> str:
    """xxh3_64 over every tensor's name and bytes, by name."""
    import xxhash

    found = xxhash.xxh3_64()
    for name in sorted(tensors):
        found.update(name.encode())
        content: Any = bytes_of(tensors[name]).numpy()
        found.update(content)
    return found.hexdigest()


def memory_kib(field: str) -> int:
    """Return VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> int:
    """Forget the peak so far; return what is resident now, in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_kib("VmRSS")


def say(**fields: object) -> None:
    """Write one line."""
    _OUT.write(json.dumps(fields) + "\n")
    _OUT.flush()


def main() -> None:
    """Load once, or write the variants."""
    name, path = sys.argv[1], Path(sys.argv[2])
    if name == "write":
        write_variants(path)
        return
    module = IMPORTS.get(name, "safetensors.torch")
    try:
        __import__(module)
    except ImportError as error:
        say(missing=f"{type(error).__name__}: {error}")
        return
    say(ready=True)
    wants_digest = json.loads(sys.stdin.readline())["digest"]
    before_kib = reset_peak()
    started = time.perf_counter()
    tensors = LOADERS[name](path)
    loaded = time.perf_counter()
    touch(tensors)
    touched = time.perf_counter()
    peak_kib = memory_kib("VmHWM")
    say(
        load_s=loaded - started,
        touch_s=touched - loaded,
        peak_bytes=(peak_kib - before_kib) * 1024,
        tensor_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        digest=digest(tensors) if wants_digest else "",
    )
    _OUT.flush()
    os._exit(0)  # tearing gigabytes down is not what is measured


if __name__ == "__main__":
    # What libraries print goes to the log; the pipe is ours.
    _OUT = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main()
