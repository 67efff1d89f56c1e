"""One run, front to back."""
