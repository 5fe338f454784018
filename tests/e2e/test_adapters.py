"""LoRA adapters through the public doors: base and two adapters in one batch over REST."""

import asyncio
import shutil
from pathlib import Path

import httpx
import pytest
import torch

from gearfall.client import AsyncClient
from gearfall.core.errors import Conflict, GearfallError, InvalidRequest, NotFound
from gearfall.demo import catalogue
from tests.cluster_host import ClusterHost
from tests.services.worker.tiny_adapters import merge, save_adapter
from tests.services.worker.tiny_checkpoints import random_model

TOKENS = 20
PROMPT = [3, 4, 5, 6, 7, 8, 9, 10]


def make_base(directory: Path) -> Path:
    """A random Llama with the demo's tokenizer, whose vocabulary is smaller.

    Its weights are float32: a worker computes it exactly, as the reference is computed.
    """
    random_model("llama", dtype=torch.float32).save_pretrained(directory)
    shutil.copy(catalogue.checkpoint_path("arith-small") / "tokenizer.json", directory)
    return directory


def merged_answer(base: Path, adapter: Path | None) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        merge(model, adapter)
    tokens = list(PROMPT)
    for _ in range(TOKENS):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


async def register(client: AsyncClient, name: str, path: Path, base: str = "") -> None:
    _ = [item async for item in client.register_model(name, str(path), base=base)]


async def ask(web: httpx.AsyncClient, model: str) -> list[str]:
    body = {
        "model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0,
        "ignore_eos": True, "logprobs": 1,
    }  # fmt: skip
    reply = await web.post("/v1/completions", json=body, timeout=60)
    reply.raise_for_status()
    assert reply.json()["model"] == model
    tokens: list[str] = reply.json()["choices"][0]["logprobs"]["tokens"]
    return tokens


@pytest.fixture
async def web(rest_url: str):
    async with httpx.AsyncClient(base_url=rest_url) as web:
        yield web


async def test_base_and_two_adapters_answer_in_one_batch(
    host: ClusterHost, client: AsyncClient, web: httpx.AsyncClient, tmp_path: Path
):
    base = make_base(tmp_path / "base")
    model = random_model("llama")
    adapters = {
        f"lora-{seed}": save_adapter(
            model, ("q_proj", "v_proj", "down_proj"), tmp_path / f"lora-{seed}", seed=seed,
            config={"base_model_name_or_path": "lora-base"},
        )
        for seed in (1, 2)
    }  # fmt: skip
    await register(client, "lora-base", base)
    for name, path in adapters.items():
        await register(client, name, path, base="lora-base" if name == "lora-1" else "")
    listed = {each["id"]: each for each in (await web.get("/v1/models")).json()["data"]}
    assert listed["lora-1"]["parent"] == "lora-base"
    assert listed["lora-1"]["gearfall"]["kind"] == "adapter"
    assert listed["lora-base"]["parent"] is None

    names = ["lora-base", *adapters] * 3
    answers = await asyncio.gather(*(ask(web, name) for name in names))
    texts = dict(zip(names, answers, strict=True))
    assert answers == [texts[name] for name in names], "an answer hangs on its batch"
    expected = {"lora-base": merged_answer(base, None)} | {
        name: merged_answer(base, path) for name, path in adapters.items()
    }
    assert len(set(map(tuple, expected.values()))) == 3
    for name, tokens in expected.items():
        found = await client.generate(
            name, PROMPT, temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=True
        )
        assert [item.token_id for item in found.choices[0].logprobs] == tokens

    status = await client.status()
    hosted = [each.model for worker in status.workers for each in worker.replicas]
    assert hosted.count("lora-base") == 1
    assert not set(hosted) & set(adapters)

    with pytest.raises(Conflict, match="base of lora-1"):
        await client.remove_model("lora-base")
    for name in adapters:
        await client.remove_model(name)
        gone = await web.post("/v1/completions", json={"model": name, "prompt": "1"})
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert await ask(web, "lora-base") == texts["lora-base"]
    await client.remove_model("lora-base")


@pytest.mark.parametrize(
    ("config", "base", "error", "text"),
    [
        ({}, "nobody", NotFound, "nobody"),
        ({}, "", InvalidRequest, "say which model"),
        ({"use_dora": True}, "lora-small", InvalidRequest, "DoRA"),
        ({}, "lora-small", InvalidRequest, "no weight|does not fit"),
    ],
)
async def test_an_adapter_that_does_not_fit_is_refused(
    client: AsyncClient, tmp_path: Path, config: dict[str, object], base: str,
    error: type[GearfallError], text: str,
):  # fmt: skip
    await register(client, "lora-small", catalogue.checkpoint_path("arith-small"))
    path = save_adapter(
        random_model("llama"), ("q_proj",), tmp_path / "lora", seed=1, config=config
    )
    with pytest.raises(error, match=text):
        await register(client, "lora-misfit", path, base)
    assert "lora-misfit" not in {model.name for model in (await client.models()).models}
