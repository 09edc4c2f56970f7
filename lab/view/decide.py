"""Decide again on recorded probabilities: what another threshold or gate temperature would have chosen, token by token.

The text is not generated again: these are the decisions on the tokens as they were recorded.
"""

from dataclasses import replace

import numpy as np
import pandas as pd

from lab.errors import SettingsError
from lab.trace import Trace

_PLACE = ["question", "sample", "pos"]


def passes_at(trace: Trace, threshold: float) -> pd.DataFrame:
    """`iterations` and `open` per token (index of `trace.tokens`) if a token went on whenever its probability exceeded `threshold`.

    A token that would go on past its last recorded probability is `open`: how far is not known, its count is a lower bound.
    At `meta["max_iter"]` every token stops. Tokens without any recorded probability keep their recorded count.
    """
    probabilities = _by_depth(trace)
    going_on = np.logical_and.accumulate(probabilities > threshold, axis=1).sum(axis=1)
    known = np.logical_and.accumulate(~np.isnan(probabilities), axis=1).sum(axis=1)
    recorded = trace.tokens["iterations"].to_numpy(float)
    limit = float(trace.meta.get("max_iter") or np.inf)
    counts = np.where(known > 0, np.minimum(1.0 + going_on, limit), recorded)
    return pd.DataFrame({"iterations": counts, "open": (known > 0) & (going_on == known) & (counts < limit)}, index=trace.tokens.index)


def with_threshold(trace: Trace, threshold: float) -> Trace:
    """The trace with `iterations` as `passes_at` would have them; raises SettingsError where no decider probability was recorded."""
    if trace.tokens["decider_prob"].isna().all() and trace.passes["decider_prob"].isna().all():
        raise SettingsError("This trace has no decider probabilities to decide on again; record it with a decider.")
    decided = passes_at(trace, threshold)
    return replace(trace, tokens=trace.tokens.assign(iterations=decided["iterations"]), meta=trace.meta | {"threshold": threshold})


def with_gates(trace: Trace, temperature: float = 1.0, threshold: float | None = None, noisy: bool = False) -> Trace:
    """The trace with `gate` decided again on its recorded `gate_logit`: s = sigmoid((logit + noise) / temperature).

    threshold: hard gates, open where s exceeds it; None takes s itself. noisy: with the recorded `gate_noise`, else without any.
    Raises SettingsError where these were not recorded, or for a temperature that is not above 0.
    """
    missing = [name for name in ("gate_logit", *(["gate_noise"] if noisy else [])) if name not in trace.tokens]
    if missing or temperature <= 0:
        raise SettingsError(f"Gates are decided again from a recorded {' and '.join(missing or ['gate_logit'])} and a temperature above 0.")
    logit = trace.tokens["gate_logit"].to_numpy(float) + (trace.tokens["gate_noise"].to_numpy(float) if noisy else 0.0)
    soft = 0.5 * (1 + np.tanh(logit / (2 * temperature)))
    gate = soft if threshold is None else np.where(np.isnan(soft), np.nan, (soft > threshold).astype(float))
    return replace(trace, tokens=trace.tokens.assign(gate=gate), meta=trace.meta | {"gate_temperature": temperature})


def _by_depth(trace: Trace) -> np.ndarray:
    """(tokens, depths) decider probabilities, NaN where none was recorded; depth 1 falls back on `tokens.decider_prob`."""
    tokens = trace.tokens
    first = tokens["decider_prob"].to_numpy(float)[:, None]
    if trace.passes.empty:
        return first
    wide = trace.passes.pivot(index=_PLACE, columns="depth", values="decider_prob")
    table = wide.reindex(columns=range(1, int(wide.columns.max()) + 1)).reindex(pd.MultiIndex.from_frame(tokens[_PLACE])).to_numpy(float)
    return np.hstack([np.where(np.isnan(table[:, :1]), first, table[:, :1]), table[:, 1:]])
