"""What sweeps need of machines, and what happens to them when machines fail."""
