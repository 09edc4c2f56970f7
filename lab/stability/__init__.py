"""Divergence noticed, rolled back and reported: the detector, the ring of checkpoints, the record of recoveries."""

from lab.stability.detector import OK, Detector, Guard, Signals, Verdict
from lab.stability.recovery import Recovery, kept_and_discarded
from lab.stability.ring import Ring

__all__ = ["OK", "Detector", "Guard", "Recovery", "Ring", "Signals", "Verdict", "kept_and_discarded"]
