"""Passes over a graph, each of which keeps its values."""
