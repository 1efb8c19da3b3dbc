"""AdaSVD (arXiv 2502.01403): weights as products of two thin matrices."""
