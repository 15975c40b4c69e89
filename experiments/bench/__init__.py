"""Benchmarks; each prints its table and writes it as JSON."""
