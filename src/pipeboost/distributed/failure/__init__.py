"""No rank waits for ever: rendezvous, heartbeats, and how a call ends on all ranks."""
