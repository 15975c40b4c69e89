"""Learned masks: which parametrisation finds what was planted, and with which settings."""
