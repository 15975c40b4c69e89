"""How patches are run: suffix replay and its parts, joint patches, and the reference that both are tested against."""
