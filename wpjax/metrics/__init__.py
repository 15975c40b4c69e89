"""What is measured: a number for each prompt from one forward pass; the anchor is one of these."""
