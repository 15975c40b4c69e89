"""Real GGUF files, against transformers' own reader of them."""
