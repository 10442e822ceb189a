"""Comparisons with diffusers' train_controlnet_sd3.py, which is no part of this project."""
