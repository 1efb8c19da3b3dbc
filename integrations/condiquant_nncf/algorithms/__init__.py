"""Algorithms of NNCF's pipelines."""
