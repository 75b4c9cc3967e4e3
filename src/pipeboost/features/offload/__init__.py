"""Residency: which component waits on the host, and when its weights are on the device."""
