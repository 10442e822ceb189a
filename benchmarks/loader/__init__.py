"""How fast a cache is read, ours and others' ways."""
