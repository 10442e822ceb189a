"""Stage 3 in little memory: what drawing takes, known before it runs."""
