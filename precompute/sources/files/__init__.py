"""Data sets of plain files: folders, zips and tables of text."""
