"""Uniform grids: levels, bounds, and the fake quantizer over them."""
