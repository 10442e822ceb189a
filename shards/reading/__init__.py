"""Reading a cache: the order of samples, and their records."""
