"""Whether an IR computes what torch simulates."""
