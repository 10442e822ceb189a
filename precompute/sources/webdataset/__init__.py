"""WebDataset tars, read from where they are."""
