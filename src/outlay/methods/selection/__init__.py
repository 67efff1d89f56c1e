"""Choosing the documents to train on, in a run and from shards."""
