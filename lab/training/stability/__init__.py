"""Divergence noticed, rolled back and reported: the detector, the ring of checkpoints, the record of recoveries."""

from lab.training.stability.detector import OK, Detector, Guard, Signals, Verdict
from lab.training.stability.recovery import Recovery, kept_and_discarded
from lab.training.stability.ring import Ring

__all__ = ["OK", "Detector", "Guard", "Recovery", "Ring", "Signals", "Verdict", "kept_and_discarded"]
