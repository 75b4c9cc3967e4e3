"""Measures full-size models: stock, tuned stock and whatever accelerates them, in one run."""
