"""PBS2P (Progressive Binarization with Semi-Structured Pruning): one bit and N of every M weights."""
