"""A ControlNet that training goes on from: finding it, and what it was trained with."""
