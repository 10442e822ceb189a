"""Drawing pictures."""
