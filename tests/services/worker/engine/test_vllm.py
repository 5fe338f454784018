"""The vLLM engine's process, over a double of vLLM's API; `test_vllm_itself` runs the real one."""

import asyncio
import importlib.util
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from gearfall.core.errors import CorruptCheckpoint, Unavailable
from gearfall.core.generation.canary import Canary, CanaryToken, parse_canary
from services.worker.engine.vllm import run_canary, serve, write_directory
from services.worker.engine.vllm_library import VllmEngine, engine_arguments, import_vllm
from services.worker.engine_link.frames import encode_frame, receive_frame_async
from services.worker.engine_link.messages import (
    EngineKind,
    EngineMessage,
    EngineReady,
    StartEngine,
    StopEngine,
)
from tests.services.worker.counting_model import answer
from tests.services.worker.engine.vllm_double import (
    VOCABULARY,
    AsyncLLM,
    EngineDeadError,
    library,
)
from tests.services.worker.engine.vllm_submissions import PROMPT, submit
from tests.services.worker.tiny_checkpoints import random_model, tiny_checkpoint


class Socket:
    """The worker's end of a served engine."""

    def __init__(self, llm: AsyncLLM, manifest: Any, processes: Sequence[int] = ()) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.setblocking(False)
        theirs.setblocking(False)
        ready = EngineReady(1, 0.1, 0.2, 0.3, 4)
        client = VllmEngine(llm, library(llm), VOCABULARY)
        self.served = asyncio.create_task(serve(theirs, client, manifest, ready, processes))

    async def send(self, message: Any) -> None:
        frame = encode_frame(msgspec.msgpack.encode(message))
        await asyncio.get_running_loop().sock_sendall(self.sock, frame)

    async def receive(self) -> Any:
        async with asyncio.timeout(10):
            frame = await receive_frame_async(self.sock)
        assert frame is not None
        return msgspec.msgpack.decode(frame[0], type=EngineMessage)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("llama")
    with tiny_checkpoint(random_model("llama-tied"), directory) as checkpoint:
        yield checkpoint


async def test_frames_over_a_socket_until_told_to_stop(checkpoint):
    worker = Socket(AsyncLLM(), checkpoint.manifest)
    assert isinstance(await worker.receive(), EngineReady)
    await worker.send(submit("a"))
    found: list[int] = []
    while len(found) < 6:
        found += [token for run in (await worker.receive()).runs for token in run.token_ids]
    assert found == answer(PROMPT, 6)
    await worker.send(StopEngine())
    assert await worker.served == 0
    worker.sock.close()


@pytest.mark.parametrize("is_dead", [True, False], ids=["vllm dies", "worker dies"])
async def test_the_engine_ends_with_vllm_and_with_the_worker(checkpoint, is_dead: bool):
    llm = AsyncLLM(is_stepped=True)
    worker = Socket(llm, checkpoint.manifest)
    await worker.receive()
    await worker.send(submit("a"))
    llm.step()
    await worker.receive()
    if is_dead:
        llm.error = EngineDeadError("out of memory")
        llm.step()
    else:
        worker.sock.close()
    async with asyncio.timeout(10):
        assert await worker.served == (1 if is_dead else 0)
    worker.sock.close()


async def test_the_engine_ends_with_a_process_of_vllms_that_is_asked_nothing(checkpoint):
    core = await asyncio.create_subprocess_exec("sleep", "60")
    worker = Socket(AsyncLLM(), checkpoint.manifest, [core.pid])
    await worker.receive()
    assert not worker.served.done()
    core.kill()
    async with asyncio.timeout(10):
        assert await worker.served == 1
        await core.wait()
        late = Socket(AsyncLLM(), checkpoint.manifest, [core.pid])
        assert await late.served == 1
    worker.sock.close()
    late.sock.close()


async def test_what_can_not_be_read_is_told_and_ends_the_engine(checkpoint, caplog):
    worker = Socket(AsyncLLM(), checkpoint.manifest)
    await worker.receive()
    await worker.send({"type": "NoSuch"})
    async with asyncio.timeout(10):
        assert await worker.served == 1
    (record,) = caplog.records
    assert record.exc_info[0] is msgspec.ValidationError
    worker.sock.close()


def start_message(checkpoint) -> StartEngine:
    return StartEngine(
        model="tiny",
        manifest_json=checkpoint.manifest_json,
        config_json=checkpoint.config_json,
        generation_config_json=b"{}",
        device="cuda:0",
        threads=1,
        slots=5,
        kv_tokens=320,
        canary_json=checkpoint.canary_json,
        engine=EngineKind.VLLM,
    )


def test_the_directory_is_one_that_transformers_reads(checkpoint, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    start = start_message(checkpoint)
    write_directory(start, checkpoint.manifest, checkpoint.map(), tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {}
    ids = torch.tensor([[5, 9, 1]])
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, attn_implementation="eager"
        )
        assert torch.equal(model(ids).logits, checkpoint.reference()(ids).logits)
    arguments = engine_arguments(library(AsyncLLM()), start, checkpoint.manifest, tmp_path)
    facts = checkpoint.manifest.model
    assert (arguments["max_num_seqs"], arguments["max_model_len"]) == (5, facts.context_tokens)
    blocks = arguments["kv_cache_memory_bytes"] // (128 * facts.kv_bytes_per_token(2))
    whole = 5 * -(-320 // 5 // 128)  # five jobs of equal length, in whole blocks
    assert blocks > whole
    assert arguments["dtype"] == "bfloat16"
    assert (arguments["skip_tokenizer_init"], arguments["trust_remote_code"]) == (True, False)


def test_tensors_that_are_equal_are_there_by_all_their_names(tmp_path: Path):
    model = random_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
    with tiny_checkpoint(model, tmp_path) as checkpoint:
        assert checkpoint.manifest.aliases
        directory = tmp_path / "for-vllm"
        directory.mkdir()
        write_directory(start_message(checkpoint), checkpoint.manifest, checkpoint.map(), directory)
    written = load_file(directory / "model.safetensors")
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in model.state_dict().items())


async def test_the_canary_is_asked_token_by_token(checkpoint):
    reference = checkpoint.reference()

    def logits(tokens: Sequence[int]) -> list[float]:
        with torch.no_grad():
            found: list[float] = reference(torch.tensor([tokens])).logits[0, -1].tolist()
        return found

    canary = parse_canary(checkpoint.canary_json)
    llm = AsyncLLM(next_logits=logits)
    vocabulary = checkpoint.manifest.model.vocabulary_size
    client = VllmEngine(llm, library(llm), vocabulary)
    await run_canary(client, canary)
    asked = [len(prompt["prompt_token_ids"]) for prompt, *_ in llm.requests]
    assert asked == [len(canary.prompt_token_ids) + place for place in range(len(canary.answer))]
    wrong = Canary(canary.prompt_token_ids, (CanaryToken(3, -0.1, 5.0, 1e-4),))
    with pytest.raises(CorruptCheckpoint, match="canary"):
        await run_canary(client, wrong)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_the_extra_the_error_says_what_to_do():
    with pytest.raises(Unavailable, match=r"gearfall\[vllm\]"):
        import_vllm()
