"""Which weights of a fine-tuned model carry its new behaviour? Weight patching in JAX."""
