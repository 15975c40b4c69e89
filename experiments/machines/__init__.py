"""What happens to a sweep when machines fail."""
