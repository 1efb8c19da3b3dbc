"""Language models of Hugging Face transformers: folders, texts, perplexity."""
