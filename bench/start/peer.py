"""A model's first token the usual way: `python peer.py DIRECTORY`, timed phase by phase."""

import json
import sys
import time

_STARTED_S = time.perf_counter()


def main() -> None:
    """Import, load, generate one token, say what each took."""
    import torch
    from transformers import AutoModelForCausalLM

    # Resolved by the auto class at its first use; it belongs to importing.
    from transformers.models.llama import modeling_llama  # noqa: F401

    imported_s = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], dtype="auto", local_files_only=True
    ).eval()
    loaded_s = time.perf_counter()
    prompt = torch.tensor([[1, 5, 9, 13, 17]])
    with torch.inference_mode():
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False
        )
    ended_s = time.perf_counter()
    phases_s = {
        "import": imported_s - _STARTED_S,
        "load": loaded_s - imported_s,
        "generate": ended_s - loaded_s,
    }
    print(json.dumps(phases_s), flush=True)


if __name__ == "__main__":
    main()
