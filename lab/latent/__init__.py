"""The three places where a model can think between words: an extra position, a second pass, a prefix."""
