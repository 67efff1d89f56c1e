"""One replication per paper: the script and what was measured."""
