"""Parquet files, read from where they are."""
