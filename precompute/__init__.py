"""Stage 1: encodes the rows of a data set into a cache, once."""
