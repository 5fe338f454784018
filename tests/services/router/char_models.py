"""Models whose tokens are the printable characters, as the router knows them."""

import asyncio
import json
import threading

from tokenizers import Tokenizer, decoders, models, processors

from gearfall.core.errors import NotFound
from gearfall.core.ids import ModelName, NodeId
from gearfall.core.records import (
    ModelRecord,
)
from services.router.generation import Prompt
from services.router.text.tokenizing import ModelTokenizer

BOS, EOS = "<bos>", "<eos>"
BOS_ID, EOS_ID = 0, 1
CHARACTERS = [chr(code) for code in range(0x20, 0x7F)]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
NODE = NodeId("node-a")


def char_tokenizer_files(*, template: str | None = TEMPLATE) -> dict[str, bytes]:
    """A tokenizer with one token for each printable ASCII character, as Hugging Face files."""
    vocabulary = {token: i for i, token in enumerate((BOS, EOS, *CHARACTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    config = {"bos_token": BOS, "eos_token": EOS, "chat_template": template}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(2 + CHARACTERS.index(character) for character in text)


def model_record(name: str, *, parameters: int = 1000, context_tokens: int = 200) -> ModelRecord:
    return ModelRecord(
        name=ModelName(name),
        digest=f"digest-{name}",
        architecture="LlamaForCausalLM",
        parameters=parameters,
        size_bytes=parameters * 2,
        context_tokens=context_tokens,
        vocabulary_size=2 + len(CHARACTERS),
        bos_token_id=BOS_ID,
        eos_token_ids=(EOS_ID,),
        source="/models/" + name,
        nodes=(NODE,),
        dtype="bfloat16",
    )


class WatchedTokenizer(ModelTokenizer):
    """Has one token a character; notes in which threads it reads prompts."""

    def __init__(self) -> None:
        super().__init__("small", char_tokenizer_files())
        self.threads: set[int] = set()

    def encode(self, prompt: Prompt, most_tokens: int | None = None) -> tuple[int, ...]:
        self.threads.add(threading.get_ident())
        return super().encode(prompt, most_tokens)


class Files:
    """A FileSource over a dictionary; counts what is read, and has it wait for a gate."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = files or char_tokenizer_files()
        self.reads = self.waiting = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def read_file(self, model: ModelRecord, file: str) -> bytes:
        self.reads += 1
        self.waiting += 1
        await self.gate.wait()
        self.waiting -= 1
        if file not in self.files:
            raise NotFound(f"no file {file}")
        return self.files[file]
