"""llama.cpp as the bench's peer, run by its own environment's Python: one batch over sequences.

Converts the random Llama to GGUF once. One JSON request a line on standard input, one JSON answer
a line on standard output. Imports nothing of gearfall: the environment has only the peer.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gguf  # type: ignore[import-not-found]
import llama_cpp  # type: ignore[import-not-found]
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

STEP_TOKENS = 512
TYPES = {"bf16": gguf.GGMLQuantizationType.BF16, "f16": gguf.GGMLQuantizationType.F16}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def convert(source: Path, target: Path, kind: str) -> None:
    """Write `source` as GGUF with matrices of `kind`, whole or not at all."""
    config = json.loads((source / "config.json").read_text())
    incoming = target.with_suffix(".incoming")
    writer = gguf.GGUFWriter(incoming, "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    heads_of = {"q_proj.weight": heads, "k_proj.weight": kv_heads}
    for name, tensor in read_bfloat16(source / "model.safetensors"):
        count = heads_of.get(name.rpartition("attn.")[2])
        ordered = tensor if count is None else interleaved(tensor, count)
        add(writer, gguf_name(name), ordered, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    incoming.rename(target)


def read_bfloat16(path: Path) -> Iterator[tuple[str, Floats]]:
    """Yield the tensors of a safetensors file in float32; all of them are bfloat16."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    halves = np.memmap(path, np.uint16, "r", offset=8 + header_bytes)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
        begin, end = (offset // 2 for offset in entry["data_offsets"])
        wide = halves[begin:end].astype(np.uint32) << 16
        yield name, wide.view(np.float32).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if name in outer:
        return outer[name]
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: Floats, heads: int) -> Floats:
    """Order a head's rows as GGUF's rotary embedding pairs them: side by side, not half by half."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def add(writer: gguf.GGUFWriter, name: str, tensor: Floats, kind: str) -> None:
    """Add a tensor, vectors as float32."""
    if tensor.ndim == 1:
        writer.add_tensor(name, tensor)
        return
    writer.add_tensor(name, gguf.quants.quantize(tensor, TYPES[kind]), raw_dtype=TYPES[kind])


class Engine:
    """One context over one model."""

    def __init__(self, path: Path, threads: int) -> None:
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        assert self._model, "llama.cpp can't load the model"
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = 32 * 512
        context.n_batch = context.n_ubatch = STEP_TOKENS
        context.n_seq_max = 32
        context.kv_unified = True
        context.n_threads = context.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        assert self._context, "llama.cpp can't make a context"
        self._batch = llama_cpp.llama_batch_init(STEP_TOKENS, 0, 1)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )

    def run(
        self, batch: int, requests: list[tuple[list[int], int]]
    ) -> tuple[float, list[list[int]]]:
        """Answer all requests, at most `batch` at a time; return the seconds and the answers."""
        begun = time.perf_counter()
        answers: list[list[int]] = [[] for _ in requests]
        waiting = list(range(len(requests)))
        running: dict[int, int] = {}  # sequence id -> request
        fed: dict[int, int] = {}  # request -> tokens in the cache
        while waiting or running:
            free = [number for number in range(batch) if number not in running]
            while waiting and free:
                request = waiting.pop(0)
                running[free.pop(0)] = request
                fed[request] = 0
            for place, sequence in self._step(running, fed, requests, answers):
                request = running[sequence]
                logits = llama_cpp.llama_get_logits_ith(self._context, place)
                row = np.ctypeslib.as_array(logits, shape=(self._vocabulary,))
                answers[request].append(int(row.argmax()))
                if len(answers[request]) == requests[request][1]:
                    del running[sequence]
                    memory = llama_cpp.llama_get_memory(self._context)
                    llama_cpp.llama_memory_seq_rm(memory, sequence, -1, -1)
        return time.perf_counter() - begun, answers

    def _step(
        self,
        running: dict[int, int],
        fed: dict[int, int],
        requests: list[tuple[list[int], int]],
        answers: list[list[int]],
    ) -> list[tuple[int, int]]:
        """Decode one batch; return (place in it, sequence) of each that samples."""
        batch = self._batch
        batch.n_tokens = 0
        sampling = []
        order = sorted(running.items(), key=lambda item: not answers[item[1]])
        for sequence, request in order:
            tokens = requests[request][0] + answers[request]
            count = min(len(tokens) - fed[request], STEP_TOKENS - batch.n_tokens)
            for position in range(fed[request], fed[request] + count):
                place = batch.n_tokens
                batch.token[place] = tokens[position]
                batch.pos[place] = position
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = sequence
                batch.logits[place] = position == len(tokens) - 1
                batch.n_tokens += 1
            fed[request] += count
            if count and fed[request] == len(tokens):
                sampling.append((batch.n_tokens - 1, sequence))
        status = llama_cpp.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode says {status}"
        return sampling


def main() -> None:
    """Answer requests until standard input ends."""
    source, threads = Path(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the library prints; only answers go to the bench
    llama_cpp.llama_backend_init()
    engines = {}
    for line in sys.stdin:
        request = json.loads(line)
        way = request.get("warm") or request["way"]
        if way not in engines:
            path = source.parent / f"model-{way}.gguf"
            if not path.exists():
                convert(source, path, way)
            engines[way] = Engine(path, threads)
        if "warm" in request:
            engines[way].run(2, [(list(range(3, 20)), 3)] * 2)
            answers.write(json.dumps({"version": llama_cpp.__version__}) + "\n")
            continue
        seconds, tokens = engines[way].run(request["batch"], request["requests"])
        firsts = [answer[0] for answer in tokens]
        answers.write(json.dumps({"seconds": seconds, "first_tokens": firsts}) + "\n")


if __name__ == "__main__":
    main()
