"""How patches are run: suffix replay, joint patches, and the slow reference that both are tested against."""
