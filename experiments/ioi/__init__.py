"""Indirect object identification in SmolLM2, and a comparison with TransformerLens."""
