"""What happens when a rank fails: all ranks of its sample leave the call within seconds, and know why."""
