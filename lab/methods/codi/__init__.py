"""CODI: continuous thoughts learned by self-distillation from the same model's written reasoning (arXiv 2502.21074)."""
