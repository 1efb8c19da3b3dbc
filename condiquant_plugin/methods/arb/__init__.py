"""ARB-LLM (arXiv 2410.03129): weights of one bit, their scales refined in turns."""
