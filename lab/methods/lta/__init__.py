"""LTA-Thinker: thoughts from a small trainable block on the base's own embeddings (arXiv 2509.12875)."""
