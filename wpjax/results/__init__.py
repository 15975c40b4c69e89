"""Result files: what they hold, and the questions users ask of them."""
