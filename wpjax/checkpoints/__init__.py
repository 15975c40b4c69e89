"""Checkpoints: folders of transformers and GGUF files, to parameters and back."""
