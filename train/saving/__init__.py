"""What a run saves: checkpoints, the trained ControlNet, and its model card."""
