"""Stable Diffusion 3 as all stages know it: finding and loading it, its inputs and outputs."""
