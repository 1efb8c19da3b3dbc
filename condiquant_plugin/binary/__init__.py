"""Convolutions of one bit: the blocks of BiDRN (arXiv 2311.14323), and those they are measured against."""
