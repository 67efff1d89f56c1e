"""Models in and out: local folders, from scratch, heads, tokenizers, exports."""
