"""The sets of samples that a run trains on: caches, controls, ranges and weights."""
