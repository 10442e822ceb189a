"""What the processes of a run share: how, what they agree on, and weights in parts."""
