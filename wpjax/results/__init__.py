"""Result files: what a sweep and a validation write, and the questions users ask of it."""
