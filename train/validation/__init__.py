"""Held-out losses and pictures during training."""
