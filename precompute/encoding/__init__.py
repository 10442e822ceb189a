"""Encoding what is missing, and writing it as shards."""
