"""Sweeps over components, and the estimates they are made of: screens, path estimators, random sets, races."""
