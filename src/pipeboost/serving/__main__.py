"""`python -m pipeboost.serving SETTINGS.json`: the HTTP process, which `pipeboost serve` becomes."""

import sys

from pipeboost.serving.process import main

sys.exit(main())
