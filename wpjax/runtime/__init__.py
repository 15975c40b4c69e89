"""How work is run: a few rows at a time, on which devices, with what progress, and where its parts and files go."""
