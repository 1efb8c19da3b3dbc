"""GPTQ (arXiv 2210.17323): rounding of weights that keeps a layer's output."""
