"""How work is run: in batches that fit in memory, on the devices, with progress, finished parts and safe files."""
