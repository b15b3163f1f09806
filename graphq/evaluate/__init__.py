"""How good it is: compare, verify, latency."""
