"""Bits for each layer, found by measurement."""
