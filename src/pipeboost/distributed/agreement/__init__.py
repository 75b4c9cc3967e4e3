"""Ranks go on with the same arguments, random state and results, or not at all."""
