"""A Hugging Face model over a mapped checkpoint, and the arithmetic of its steps."""
