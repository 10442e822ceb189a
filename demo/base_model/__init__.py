"""How the miniature base model was made."""
