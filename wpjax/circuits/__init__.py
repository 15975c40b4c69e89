"""Circuits: how an effect gets from the weights that make it to the behaviour."""
