"""A SoftCoT model: thoughts are projected states of a frozen assistant (`softcot.md` 2, 3)."""

from lab.methods.lta.model import ThoughtModel


class SoftcotModel(ThoughtModel):
    """The assistant mode of `ThoughtModel` under its own name."""

    method = "softcot"
