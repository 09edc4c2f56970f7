"""SoftCoT and SoftCoT++: thoughts from a frozen assistant through a trained projection (arXiv 2502.12134, 2505.11484)."""
