"""Indirect object identification in SmolLM2, a known circuit, and a comparison with TransformerLens."""
