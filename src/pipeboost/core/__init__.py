"""What everything stands on: seams, the ledger, settings, errors, hardware, and what a model family is."""
