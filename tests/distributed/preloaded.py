"""What the ranks' server process imports once, so that a new rank begins with it."""

import gc

import pipeboost.acceleration  # noqa: F401
from tests.pipelines import tiny  # noqa: F401

gc.freeze()  # shared by the ranks, and nothing in it is garbage
