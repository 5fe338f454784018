"""Tokens of prompts and text of tokens, by the tokenizer.json that lies beside a checkpoint."""

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

from tokenizers import Tokenizer

from gearfall.core.errors import CorruptCheckpoint, InvalidRequest, NotFound, Overloaded
from gearfall.core.records import ModelRecord
from services.router.generation import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from services.router.text.chat_template import ChatTemplate
from services.router.text.token_bytes import ByteReader

IN_LOOP_CHARACTERS = 2048
"""Prompts up to this length are tokenised at once; longer ones in a thread."""
_MESSAGE_CHARACTERS = 32
"""That a chat's template may put around a message."""
MAX_TOKENIZERS = 64
_ROOMY_CHARACTERS = 16
"""Of one token: text is four times as dense, and more."""
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


class FileSource(Protocol):
    """Where the small files of a checkpoint come from."""

    async def read_file(self, model: ModelRecord, file: str) -> bytes:
        """Return the file's content; NotFound or Unavailable."""
        ...


class ModelTokenizer:
    """Tokenizer and chat template of one model. Thread-safe: nothing changes after construction."""

    def __init__(self, model: str, files: Mapping[str, bytes]) -> None:
        """Raises CorruptCheckpoint when tokenizer.json is missing or does not parse."""
        self.model = model
        self.content_key = _content_key(files)
        """Equal for models that tokenise alike: their prompts are encoded once."""
        if "tokenizer.json" not in files:
            raise CorruptCheckpoint(f"model {model} has no tokenizer.json")
        self.vocabulary_key = hashlib.sha256(files["tokenizer.json"]).digest()
        """Equal for models whose token ids mean the same, whatever their chat templates are."""
        try:
            self._tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # tokenizers raises bare Exception
            raise CorruptCheckpoint(f"tokenizer.json of {model} is broken: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _json(files.get("tokenizer_config.json", b"{}"))
        special = _special_tokens(_json(files.get("special_tokens_map.json", b"{}")) | config)
        self._bos_id = self._tokenizer.token_to_id(special.get("bos_token", ""))
        self._template_source = _template_source(files, config)
        self._special = special
        self._template: ChatTemplate | None = None
        self._bytes = ByteReader(_json(files["tokenizer.json"]))

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, prompt: Prompt, most_tokens: int | None = None) -> tuple[int, ...]:
        """Return the prompt's token ids, special tokens not doubled. Raises InvalidRequest.

        Of a text that is far above `most_tokens` only a beginning that is more than twice as long:
        nobody wants the tokens of what is to be refused.
        """
        return self._encode(prompt, "", most_tokens)

    def encode_answer(self, prompt: Prompt, answer: str) -> tuple[int, ...]:
        """Return the tokens of an answer as they would follow the prompt's.

        Empty where they can't be told from the prompt's, which is so whenever its end and the
        answer's beginning make one token, or the prompt came as tokens of one model.
        """
        if isinstance(prompt, TokenPrompt):
            return ()
        before, whole = self._encode(prompt, "", None), self._encode(prompt, answer, None)
        return whole[len(before) :] if whole[: len(before)] == before else ()

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of consecutive tokens, special tokens left out."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def token_text(self, token_id: int) -> tuple[str, bytes]:
        """Return one token as text and as the bytes it stands for, special tokens included."""
        text = self._tokenizer.decode((token_id,), skip_special_tokens=False)
        return text, self._bytes.bytes_of(self._tokenizer.id_to_token(token_id) or "", text)

    def _encode(self, prompt: Prompt, answer: str, most_tokens: int | None) -> tuple[int, ...]:
        if isinstance(prompt, TokenPrompt):
            return prompt.token_ids
        if isinstance(prompt, ChatPrompt):
            text = self._chat_template().render(prompt.messages) + answer
            return tuple(self._text_ids(text, most_tokens, has_special=False))
        ids = self._text_ids(prompt.text + answer, most_tokens, has_special=True)
        is_doubled = len(ids) > 1 and self._bos_id is not None and ids[0] == ids[1] == self._bos_id
        return tuple(ids[1:] if is_doubled else ids)

    def _text_ids(self, text: str, most_tokens: int | None, *, has_special: bool) -> list[int]:
        size = max(IN_LOOP_CHARACTERS, _ROOMY_CHARACTERS * (most_tokens or 0))
        while most_tokens is not None and size < len(text):
            ids = self._ids(text[:size], has_special=has_special)
            if len(ids) > 2 * most_tokens:
                return ids
            size *= 4
        return self._ids(text, has_special=has_special)

    def _ids(self, text: str, *, has_special: bool) -> list[int]:
        # `encode` keeps the interpreter's lock all the while: every stream would stand.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=has_special)
        return batch[0].ids

    def _chat_template(self) -> ChatTemplate:
        if self._template_source is None:
            raise InvalidRequest(
                f"model {self.model} has no chat template: use /v1/completions", param="messages"
            )
        if self._template is None:
            self._template = ChatTemplate(self._template_source, self._special)
        return self._template


class TokenizerCache:
    """Tokenizers by model digest, each fetched once however many requests ask at once."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        self._tasks: OrderedDict[str, asyncio.Task[ModelTokenizer]] = OrderedDict()
        self._is_stopped = False

    def has(self, model: ModelRecord) -> bool:
        """Whether the model's tokenizer is here."""
        task = self._tasks.get(model.digest)
        return task is not None and task.done()

    async def get(self, model: ModelRecord) -> ModelTokenizer:
        """Return the model's tokenizer.

        Raises Unavailable when no store can be read, Overloaded when the cache stops before that.
        """
        task = self._tasks.get(model.digest)
        if task is None:
            if self._is_stopped:
                raise _stopping()
            task = asyncio.create_task(self._fetch(model), name=f"tokenizer-{model.name}")
            self._tasks[model.digest] = task
            task.add_done_callback(lambda done: self._forget_failed(model.digest, done))
            self._evict()
        else:
            self._tasks.move_to_end(model.digest)
        try:
            return task.result() if task.done() else await asyncio.shield(task)
        except asyncio.CancelledError:
            asker = asyncio.current_task()
            if task.cancelled() and not (asker and asker.cancelling()):
                raise _stopping() from None
            raise

    async def stop(self) -> None:
        """Cancel what is being fetched, and fetch no more."""
        self._is_stopped = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _evict(self) -> None:
        while len(self._tasks) > MAX_TOKENIZERS:
            self._tasks.popitem(last=False)

    def _forget_failed(self, digest: str, task: "asyncio.Task[ModelTokenizer]") -> None:
        if (task.cancelled() or task.exception()) and self._tasks.get(digest) is task:
            del self._tasks[digest]

    async def _fetch(self, model: ModelRecord) -> ModelTokenizer:
        names = [name for name in _FILES if not model.files or name in model.files]
        contents = await asyncio.gather(*(self._read(model, name) for name in names))
        files = {
            name: content
            for name, content in zip(names, contents, strict=True)
            if content is not None
        }
        return await asyncio.to_thread(ModelTokenizer, model.name, files)

    async def _read(self, model: ModelRecord, name: str) -> bytes | None:
        try:
            return await self._source.read_file(model, name)
        except NotFound:
            return None


async def encode_prompt(
    tokenizer: ModelTokenizer,
    prompt: Prompt,
    most_tokens: int | None = None,
    *,
    among: Sequence[Prompt] = (),
) -> tuple[int, ...]:
    """Return the prompt's token ids, as `encode`; a long prompt is tokenised in a thread.

    `among`: the prompts of its request, which count as one: all are read in one turn of the loop.
    """
    if _are_short(among or (prompt,)):
        return tokenizer.encode(prompt, most_tokens)
    return await asyncio.to_thread(tokenizer.encode, prompt, most_tokens)


def _content_key(files: Mapping[str, bytes]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {len(files[name])}\n".encode() + files[name])
    return digest.digest()


def _are_short(prompts: Sequence[Prompt]) -> bool:
    sizes = (size for prompt in prompts for size in _sizes(prompt))
    return all(total <= IN_LOOP_CHARACTERS for total in accumulate(sizes))


def _sizes(prompt: Prompt) -> Iterator[int]:
    if isinstance(prompt, TextPrompt):
        yield len(prompt.text)
    elif isinstance(prompt, ChatPrompt):
        for message in prompt.messages:
            yield len(message.role) + len(message.content) + _MESSAGE_CHARACTERS


def _stopping() -> Overloaded:
    return Overloaded("this router is stopping", retry_after_s=1.0)


def _json(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"a tokenizer file is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint("a tokenizer file is not a JSON object")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _template_source(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", "replace")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {
            each.get("name"): each.get("template") for each in template if isinstance(each, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) else None
