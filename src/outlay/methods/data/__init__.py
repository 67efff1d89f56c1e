"""Which training examples are seen, and when."""
