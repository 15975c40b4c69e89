"""Which ranking finds the smallest set of components that carries the behaviour?"""
