"""Data sets: rows, and the bytes of their images."""
