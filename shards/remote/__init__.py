"""Caches behind URLs."""
