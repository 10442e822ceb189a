"""The cache: its format, reading it, copying it; `python -m shards`."""
