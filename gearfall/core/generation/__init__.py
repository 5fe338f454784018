"""One generation: what is asked, its tokens, its history, what it took."""
