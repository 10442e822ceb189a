"""What lies on disk: records, shards, sidecars, the manifest."""
