"""What merging brings: every method on experts of one behaviour each, judged by the checkers."""
