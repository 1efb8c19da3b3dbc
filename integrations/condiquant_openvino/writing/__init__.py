"""From fake quantizers to an IR."""
