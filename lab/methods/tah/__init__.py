"""Think-at-Hard: a second pass over the tokens that a decider finds hard (arXiv 2511.08577)."""
