"""What training takes in memory, and how to take less."""
