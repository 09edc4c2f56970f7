"""CoLaR: compressed latent reasoning (arXiv 2505.16552), c reasoning tokens merged into one predicted embedding."""
