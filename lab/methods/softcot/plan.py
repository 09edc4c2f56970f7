"""SoftCoT trains with LTA's notebook."""

from lab.methods.lta.plan import trainings

__all__ = ["trainings"]
