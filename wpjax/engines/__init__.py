"""How patches are run: suffix replay and what it is made of, joint patches, and the reference they are tested against."""
