"""The embedded base and its experts."""
