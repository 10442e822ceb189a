"""What stages take of memory: counted for a card, and really run at true size."""
