"""Test-time scaling of latent reasoning: stochastic thoughts, votes, a reward model over thoughts, best-of-N and beams."""
