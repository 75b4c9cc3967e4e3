"""Step caching: cache-dit decides, step by step, whether the middle blocks of a transformer run or are extrapolated.

`attach_cache` is the verb. cache-dit is imported when a cache is attached, not before.
"""

from pipeboost.features.cache.attach import attach_cache
from pipeboost.features.cache.state import CacheCount

__all__ = ["CacheCount", "attach_cache"]
