"""Packaged models and data, found where they are installed."""
