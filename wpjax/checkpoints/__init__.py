"""Checkpoints: from Hugging Face folders and GGUF files to parameters, and from parameters to folders."""
