"""The engine's CPU kernels beside torch: linear layers in bf16 and f32, attention in f32.

Every case runs all contenders in turn, round after round, so that a busy machine slows all alike;
printed are medians over rounds and the ratio torch / gearfall per round as median (low-high
quartile), above 1 where gearfall is faster. The bf16 contender of torch rounds activations to bf16,
ours does not. `python -m bench.engine.kernels --help`.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gearfall.infra.kernels import cpu_kernels

WIDTHS = (192, 1024, 4096)
TOKENS = (1, 8, 32, 512)
SHAPES = ((6, 6, 32), (9, 3, 64), (32, 8, 128))
BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Result:
    """One case: seconds of ours and torch's, and torch's over ours with its quartiles."""

    case: str
    ours_s: float
    torch_s: float
    ratio: float
    ratio_low: float
    ratio_high: float


def compare(
    case: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> Result:
    """Time both by turns, each long enough for the clock, after one warming call."""
    once_s = max(_seconds(ours, 1), _seconds(theirs, 1), _seconds(ours, 1), _seconds(theirs, 1))
    calls = max(1, int(0.01 / once_s))
    pairs = [(_seconds(ours, calls), _seconds(theirs, calls)) for _ in range(rounds)]
    low, middle, high = statistics.quantiles((b / a for a, b in pairs), n=4)
    ours_s, torch_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Result(case, ours_s, torch_s, middle, low, high)


def _seconds(call: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def linear_case(width: int, tokens: int, dtype: torch.dtype, threads: int, rounds: int) -> Result:
    """Compare `linear` with `F.linear`, both with a square weight of `dtype`."""
    x, weight = torch.randn(tokens, width), torch.randn(width, width).to(dtype)
    same = x.to(dtype)
    return compare(
        f"linear {str(dtype).removeprefix('torch.')} width {width} T {tokens}",
        lambda: cpu_kernels.linear(x, weight, threads=threads),
        lambda: torch.nn.functional.linear(same, weight),
        rounds,
    )


def attention_case(
    shape: tuple[int, int, int], tokens: int, context: int, threads: int, rounds: int
) -> Result:
    """Compare `paged_attention` with SDPA: a prefill of `context`, or one token of each of T."""
    heads, kv_heads, size = shape
    is_prefill = tokens == context
    sequences = 1 if is_prefill else tokens
    blocks = sequences * context // BLOCK_TOKENS
    k_cache, v_cache = torch.randn(2, blocks, BLOCK_TOKENS, kv_heads, size)
    tables = torch.randperm(blocks, dtype=torch.int32).reshape(sequences, -1)
    if is_prefill:
        seq_index, positions = torch.zeros(tokens), torch.arange(tokens)
    else:
        seq_index, positions = torch.arange(tokens), torch.full((tokens,), context - 1)
    seq_index, positions = seq_index.int(), positions.int()
    q = torch.randn(tokens, heads, size)
    k, v = (
        cache[tables.long()]
        .reshape(sequences, context, kv_heads, size)
        .transpose(1, 2)
        .contiguous()
        for cache in (k_cache, v_cache)
    )
    torch_q = q.reshape(sequences, -1, heads, size).transpose(1, 2).contiguous()
    scale = size**-0.5
    kind = "prefill" if is_prefill else f"decode T {tokens}"
    return compare(
        f"attention {heads}/{kv_heads}x{size} {kind} context {context}",
        lambda: cpu_kernels.paged_attention(
            q, k_cache, v_cache, tables, seq_index, positions, scale=scale, threads=threads
        ),
        lambda: torch.nn.functional.scaled_dot_product_attention(
            torch_q, k, v, is_causal=is_prefill, scale=scale, enable_gqa=True
        ),
        rounds,
    )


def run(threads: int, rounds: int, widths: list[int]) -> list[Result]:
    """Run all cases, printing each as it is done."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(f"{'case':52} {'ours us':>10} {'torch us':>10}  torch/ours (quartiles)")
    dtypes = (torch.bfloat16, torch.float32)
    results = [
        _shown(linear_case(width, tokens, dtype, threads, rounds))
        for width, dtype, tokens in itertools.product(widths, dtypes, TOKENS)
    ]
    results += [
        _shown(attention_case(shape, tokens, 512, threads, rounds))
        for shape, tokens in itertools.product(SHAPES, TOKENS)
    ]
    return results


def _shown(result: Result) -> Result:
    times = f"{result.ours_s * 1e6:10.1f} {result.torch_s * 1e6:10.1f}"
    ratio = f"{result.ratio:.2f} ({result.ratio_low:.2f}-{result.ratio_high:.2f})"
    print(f"{result.case:52} {times}  {ratio}", flush=True)
    return result


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads of both sides")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of each case")
    parser.add_argument("--width", type=int, action="append", help="linear width; repeatable")
    parser.add_argument("--out", type=Path, default=Path("bench/results/kernels.json"))
    arguments = parser.parse_args()
    results = run(arguments.threads, arguments.rounds, arguments.width or list(WIDTHS))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "variants": cpu_kernels.variants(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "results": [asdict(result) for result in results],
    }
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
