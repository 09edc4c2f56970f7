"""Backbones, tokenizers, strict loading, the decoder step and the checkpoint layouts behind `lab.load`."""
