"""Inputs of linear layers transformed so that a grid costs their outputs least."""
