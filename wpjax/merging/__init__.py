"""Merging: several experts of one base made into one model, tensor by tensor.

`methods` holds the ways to merge, one entry each (`registry`); `recipe` reads what a user wants, `plan` checks it
against the models, `merge` does it.
"""
