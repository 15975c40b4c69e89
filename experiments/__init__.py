"""Experiments: how the shipped models were made, and results on real ones."""
