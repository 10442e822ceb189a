"""Stage 1 in little memory: what it takes, known before it runs, and T5 layer by layer."""
