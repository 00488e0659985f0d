"""How fast training is, and what the figures cost."""
