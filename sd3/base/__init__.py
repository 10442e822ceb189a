"""Base models as people have them: folders, hub ids, one-file checkpoints, LoRAs."""
