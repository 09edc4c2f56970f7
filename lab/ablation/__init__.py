"""Are the thoughts doing anything? The same questions, answered with thoughts as they are and with thoughts that cannot carry the answer.

`ablate` makes one table of all interventions on a `Subject`: a model, questions, and what judges its answers. What an intervention does
not cost, the thoughts did not do. Works wherever a thought can stand: at extra positions, in gated words, in second passes, in a prompt.
"""

from lab.ablation.interventions import INTERVENTIONS, Thoughts
from lab.ablation.subjects import Subject, subject_of
from lab.ablation.table import ablate

__all__ = ["INTERVENTIONS", "Subject", "Thoughts", "ablate", "subject_of"]
