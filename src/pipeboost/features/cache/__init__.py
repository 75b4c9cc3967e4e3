"""Step caching: cache-dit decides, step by step, whether the middle blocks of a transformer run or are extrapolated.

cache-dit is imported when a cache is attached, not before.
"""
