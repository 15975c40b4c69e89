"""Sweeps over components, and the methods that a sweep can use: screens, path estimators, random sets, races."""
