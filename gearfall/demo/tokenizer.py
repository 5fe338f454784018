"""The demo's character tokenizer, written as ordinary Hugging Face files.

Seventeen tokens: four special ones, ten digits and `+ - =`. Whitespace is dropped, any other
character is `<unk>`. Encoding with special tokens puts `<bos>` in front and nothing behind, which
is what a raw completion prompt needs; the chat template writes `<bos>` itself, so its text is to be
encoded without special tokens, as Hugging Face does.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
CHARACTERS = "0123456789+-="
VOCABULARY: dict[str, int] = {token: i for i, token in enumerate((PAD, BOS, EOS, UNK, *CHARACTERS))}

CHAT_TEMPLATE = """\
{%- set found = namespace(question='', answer=none) -%}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {%- set text = message['content'] -%}
  {%- else -%}
    {%- set text = message['content'] | map(attribute='text') | join('') -%}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {%- set found.question = text | replace('plus', '+') | replace('minus', '-') -%}
    {%- set found.answer = none -%}
  {%- elif message['role'] == 'assistant' -%}
    {%- set found.answer = text -%}
  {%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for character in found.question -%}
  {%- if character in '0123456789+-' -%}{{- character -}}{%- endif -%}
{%- endfor -%}
{{- '=' -}}
{%- if found.answer is not none -%}{{- found.answer + eos_token -}}{%- endif -%}
"""
"""Turns the last user message into a question: `What is 123+45?` becomes `<bos>123+45=`.

Everything but digits and operators is dropped, earlier turns too; an answer after it is closed with
`<eos>`. The words plus and minus count as operators.
"""


def build_tokenizer() -> Tokenizer:
    """The tokenizer, with `<bos>` put in front when special tokens are added."""
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[], unk_token=UNK))
    tokenizer.add_special_tokens([PAD, BOS, EOS, UNK])
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), "")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def save_tokenizer(directory: Path, *, max_tokens: int) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

    `max_tokens` is the longest sequence the model accepts, in tokens.
    """
    build_tokenizer().save(str(directory / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
        **special,
    }
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", special)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
