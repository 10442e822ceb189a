"""AdamW and what goes with it."""
