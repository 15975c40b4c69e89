"""The one decoder: its parts, wiring, families and generation."""
