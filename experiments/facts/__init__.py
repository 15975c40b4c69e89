"""Where does SmolLM2 recall facts, and what does rewriting one change?"""
