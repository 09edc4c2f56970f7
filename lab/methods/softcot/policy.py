"""Answering with SoftCoT: as LTA-Thinker does; the published sampling is at temperature 1."""

from lab.methods.lta.policy import generate

__all__ = ["generate"]
