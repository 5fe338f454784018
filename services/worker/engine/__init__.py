"""One engine process: batch, cache, model and the loop that steps them."""
