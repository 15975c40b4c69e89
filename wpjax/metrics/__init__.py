"""Metrics: one number for each prompt, read from one forward pass. The anchor score is one of them."""
