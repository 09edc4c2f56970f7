"""LatentTTS (arXiv 2510.07745): sampling latent thoughts, and a reward model that chooses among them."""
