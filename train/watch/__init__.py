"""What a run tells while it goes: the names of its curves, and the trackers that show them."""
