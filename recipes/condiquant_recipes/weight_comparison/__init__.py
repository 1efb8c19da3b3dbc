"""``condiquant compare-weights``: what few bits of weights cost a language model, method by method."""
