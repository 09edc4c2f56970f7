"""`CustomGRPOTrainer`: GRPO for gated models, with the gate's own credit, its statistics, and a table of examples (`dtt.md` 2.4, 2.7)."""

import logging
import math
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from lab import files
from lab.launch import rank
from lab.methods.dtt.reinforce import PROGRESS
from lab.methods.dtt.reward import find_span
from lab.methods.dtt.tables import HISTOGRAMS, binned
from lab.training.trl_trainer import LatentGRPOTrainer

EXAMPLES = "examples.jsonl"
SHOWN = 8  # examples a logged step
NEVER = (
    "No completion of the first step is [bot] … [eot] answer: every correctness is the malformed one, so nothing but the penalties "
    "would be learned. Warm the model up on that format first (step warm_up), or put [bot] into the prompt (bot_in_prompt)."
)
NOTHING = (
    "Every well-formed completion of step %d reasons for no token at all: shorter is rewarded even where it costs answers. "
    "Look at the accuracy at each length; lower lambda_penalty, or let it rise (lambda_warmup)."
)
log = logging.getLogger(__name__)


class CustomGRPOTrainer(LatentGRPOTrainer):
    """TRL's GRPOTrainer with gated rollouts in this library's engine; `thinking` is a `GatedThinking`."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._progress_rows: list[dict[str, Any]] = []
        self._collapsed = False

    def _roll_out(self, prompts: list[list[int]], trainer: Any) -> dict[str, Any]:
        self.thinking.at(self.state.global_step / self.s.steps)
        return super()._roll_out(prompts, trainer)

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        found = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._correct = found[:, 0]
        first = rank() * len(prompts)
        self._note_gates(inputs, completion_ids_list, found[first : first + len(prompts)])
        return found

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        if self.thinking.how.constant_groups == "drop":
            out["advantages"] = out["advantages"] * self._varied()[rank() * len(inputs) :][: len(inputs)]
        return out

    def _varied(self) -> Tensor:
        """(all rows,) 1 where a group's correctness is not the same for all, 0 where only penalties would tell its rows apart."""
        groups = self._correct.view(-1, self.s.samples)
        varied = (groups.max(1).values > groups.min(1).values).float()
        self._metrics["train"]["groups/varied"].append(float(varied.mean()))
        return varied.repeat_interleave(self.s.samples)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """TRL's loss and the gate's own credit.

        The credit is not divided by the row's length as TRL's token sums are: divided alike, it is the exact missing part of the
        gradient, but the gate then follows the noise of the tokens' luck and one toy seed of three collapsed.
        """
        loss = super()._compute_loss(model, inputs)
        if self.thinking.credit == "pathwise":
            credit = self.thinking.how.weight * self.thinking.error.mean() / self.current_gradient_accumulation_steps
            self.signals["rl/loss"] = self.signals["rl/loss"] + credit.detach()
            loss = loss + credit
        return loss

    # ---- monitoring ----
    def _note_gates(self, inputs: list, ids: list[list[int]], rewards: Tensor) -> None:
        """Logs gate means inside and outside the span, lengths and temperature; writes some examples down."""
        gates, s = self._acts.extras["gates"], self.thinking.model.config
        spans = [find_span(row, s.bot_id, s.eot_id, s.bot_in_prompt) for row in ids]
        split = [_split(values, span) for values, span in zip(gates, spans, strict=True)]
        numbers = {
            "gate/mean": _mean([g for row in gates for g in row]),
            "gate/inside": _mean([g for own, _ in split for g in own]),
            "gate/outside": _mean([g for _, other in split for g in other]),
            "gate/temperature": getattr(self.thinking.model.gate, "temperature", math.nan),
            "reasoning/length": _mean([span.tokens for span in spans if span]),
            "reasoning/well_formed": fmean(span is not None for span in spans),
        }
        for name, value in numbers.items():
            self._metrics["train"][name].append(value)
        step = self.state.global_step + 1
        if step == 1 and s.gate == "dtt" and not any(spans):
            log.warning(NEVER)
        if not self._collapsed and any(spans) and not any(span.tokens for span in spans if span):
            self._collapsed = True
            log.warning(NOTHING, step)
        if rank() == 0 and (step % self.s.log_every == 0 or step == 1):
            rows = self._examples(step, inputs, ids, rewards, split, spans)
            own, rest = ([g for pair in split for g in pair[side]] for side in (0, 1))
            lengths = Counter(span.tokens for span in spans if span)
            self._keep(EXAMPLES, rows)
            self._keep(
                HISTOGRAMS, [{"step": step, "inside": binned(own), "outside": binned(rest), "lengths": dict(sorted(lengths.items()))}]
            )
            if self.s.report_to == "wandb":
                _to_wandb(step, rows, own + rest, list(lengths.elements()))

    def _examples(self, step: int, inputs: list, ids: list, rewards: Tensor, split: list, spans: list) -> list[dict[str, Any]]:
        decode, rows = self.processing_class.decode, []
        for i in range(min(SHOWN, len(ids))):
            row = {"step": step, "prompt": decode(inputs[i]["prompt"]), "completion": decode(ids[i]), "answer": inputs[i].get("answer")}
            row |= dict(zip(self.reward_func_names, rewards[i].tolist(), strict=True))
            row |= {"reasoning_tokens": spans[i].tokens if spans[i] else None}
            rows.append(row | {"gate_inside": _mean(split[i][0]), "gate_outside": _mean(split[i][1])})
        return rows

    def _keep(self, name: str, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            files.append_line(Path(self.args.output_dir) / name, files.plain(row))

    def _emit(self, row: dict[str, Any]) -> None:
        super()._emit(row)
        if rank() == 0 and self.s.report_to == "wandb":
            self._progress_rows.append({"step": row["step"], **{shown: row.get(key, math.nan) for key, shown in PROGRESS.items()}})
            _log_wandb({"train/train_progress_summary": _table(self._progress_rows)}, commit=True)


def _split(gates: list[float], span: Any) -> tuple[list[float], list[float]]:
    """Gates of the reasoning side ([bot] excluded, [eot] included) and the others."""
    own = [g for place, g in enumerate(gates) if span and span.bot < place <= span.eot]
    return own, [g for place, g in enumerate(gates) if not (span and span.bot < place <= span.eot)]


def _mean(values: list[float]) -> float:
    return fmean(values) if values else math.nan


def _to_wandb(step: int, rows: list[dict[str, Any]], gates: list[float], lengths: list[int]) -> None:
    """Histograms of gates and lengths, and the per-example table, under the seed's names; they go with the step's next numbers."""
    from wandb import Histogram

    shown = {"train/step": step, "train/examples": _table(rows), "train/gate_histogram_overall": Histogram(gates)}
    _log_wandb(shown | ({"train/reasoning_length_histogram": Histogram(lengths)} if lengths else {}), commit=False)


def _table(rows: list[dict[str, Any]]) -> Any:
    from wandb import Table

    return Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])


def _log_wandb(shown: dict[str, Any], commit: bool) -> None:
    import wandb

    if wandb.run is not None:
        wandb.log(shown, commit=commit)
