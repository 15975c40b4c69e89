"""Circuits where the truth is known."""
