"""A real pair: SmolLM2-135M-Instruct and an expert made from it."""
