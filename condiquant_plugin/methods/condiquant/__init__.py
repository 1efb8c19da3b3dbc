"""CondiQuant (arXiv 2502.15478): weights of a lower condition number."""
