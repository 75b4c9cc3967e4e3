"""Attention on one device: which kernel runs, chosen per call, inside the blocks' own processors."""
