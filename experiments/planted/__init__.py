"""The planted benchmark: experts whose sources are known, and how well each ranking finds them."""
