"""`python -m pipeboost` is the command `pipeboost`."""

from pipeboost.cli import main

main()
