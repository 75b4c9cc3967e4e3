"""What the ranks' server process imports once, so that a new rank begins with it."""

import pipeboost.acceleration  # noqa: F401
from tests.pipelines import tiny  # noqa: F401
