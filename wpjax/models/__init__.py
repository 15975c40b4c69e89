"""Decoders, their checkpoints and generation."""
