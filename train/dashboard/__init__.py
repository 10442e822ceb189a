"""The page of a run (--dashboard): one file, made from what the run writes."""
