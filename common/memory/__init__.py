"""How much memory a stage takes, and whether a device has it."""
