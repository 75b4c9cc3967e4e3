"""Finds the step schedule that computes the fewest forwards within a budget of quality, on the user's own prompts."""
