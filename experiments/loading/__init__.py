"""How fast large checkpoints load, and how much memory that takes."""
