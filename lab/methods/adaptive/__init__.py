"""Adaptive latent reasoning: thoughts through a recurrent filter, a head that decides when to stop, distillation, and RL on the count."""
