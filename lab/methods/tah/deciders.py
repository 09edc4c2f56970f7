"""Who decides that a token is read once more: labels, a small MLP, a reference model, always, never.

A decider sees the tokens that have just finished pass `depth` (n of them) and says for each whether it continues, with a
logit. The cap on the number of passes belongs to the loop (a decider whose own cap is larger cannot lose a token).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lab.errors import SettingsError
from lab.methods.tah.config import AlwaysSettings, LabelSettings, MLPSettings, OracleSettings, Settings, decider_settings

CAPPED = -10.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Seen:
    """What a decider may look at, for n tokens that finished pass `depth` (1 = the first).

    `top` (n, k): the largest cumulative logits, descending; `hidden` (n, m, D): the decider's hidden states in its order;
    `labels` (n,): passes wanted by the data set, -100 = none; `guess` (n,): the model's most likely token;
    `wanted` (n,): the reference model's. Fields a decider does not ask for are None.
    """

    depth: int
    count: int
    top: Tensor | None = None
    hidden: Tensor | None = None
    labels: Tensor | None = None
    guess: Tensor | None = None
    wanted: Tensor | None = None
    device: torch.device | None = None


class Decider(nn.Module):
    """Base: `taps` hidden states, `topk` logits, `guesses` and `reference` say what the model has to collect for it."""

    taps: tuple[int, ...] = ()
    topk: int = 0
    guesses: bool = False
    labelled: bool = False
    max_iter: int = 2

    def logit(self, seen: Seen) -> Tensor:
        """Logits (n,) of continuing before any cap."""
        return torch.zeros(seen.count, device=seen.device)

    def again(self, seen: Seen, logit: Tensor) -> Tensor:
        """Decisions (n,) bool before any cap."""
        return torch.zeros(seen.count, dtype=torch.bool, device=logit.device)

    def forward(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Decisions (n,) bool and logits (n,); at the decider's own cap all stop with logit -10."""
        if seen.depth >= self.max_iter:
            capped = torch.full((seen.count,), CAPPED, device=seen.device)
            return capped > 0, capped
        logit = self.logit(seen)
        return self.again(seen, logit), logit


class NeverDecider(Decider):
    """`TrivialIterDecider`: every token stops after one pass."""

    def __init__(self, max_iter: int = 2):
        super().__init__()
        self.max_iter = max_iter


class AlwaysDecider(Decider):
    """`AlwaysWrapperIterDecider`: overrides the decision, passes the base decider's logits through."""

    def __init__(self, settings: AlwaysSettings, base: Decider | None = None):
        super().__init__()
        self.base, self.go, self.max_iter = base or NeverDecider(), settings.mode == "continue", settings.max_iter or 2
        for name in ("taps", "topk", "guesses", "labelled"):
            setattr(self, name, getattr(self.base, name))

    def logit(self, seen: Seen) -> Tensor:
        return self.base(seen)[1]

    def again(self, seen: Seen, logit: Tensor) -> Tensor:
        return torch.full((seen.count,), self.go, device=logit.device)


class LabelDecider(Decider):
    """`IterLabelDecider`: continues while the label asks for more passes; without labels always stops."""

    labelled = True

    def __init__(self, settings: LabelSettings):
        super().__init__()
        self.max_iter = settings.max_iter or 2
        self.register_buffer("threshold", torch.tensor(settings.threshold))

    def again(self, seen: Seen, logit: Tensor) -> Tensor:
        if seen.labels is None:
            return super().again(seen, logit)
        return (seen.labels > seen.depth) & (seen.labels != -100)


class OracleDecider(Decider):
    """`OracleDynamicIterDecider`: continues where the first pass's best token is not the reference model's.

    Args:
        settings: error rates to imitate: `false_positive_rate` of the right tokens continue all the same,
            `false_negative_rate` of the wrong ones stop.
        reference: gives the reference model's greedy next token (see `reference.py`); None = `settings.model`, loaded when
            first asked, or nothing where `wanted` is handed over.
    """

    guesses = True

    def __init__(self, settings: OracleSettings, reference=None):
        super().__init__()
        self.settings, self._reference, self.max_iter = settings, reference, settings.max_iter or 2
        self.random = torch.Generator().manual_seed(settings.seed)

    @property
    def reference(self):
        """The reference model, or None where the settings name none."""
        if self._reference is None and self.settings.model:
            from lab.methods.tah.reference import Reference
            from lab.models.backbones import load_backbone

            self._reference = Reference(load_backbone(self.settings.model, dtype="auto"))
        return self._reference

    def again(self, seen: Seen, logit: Tensor) -> Tensor:
        if seen.depth > 1:
            return super().again(seen, logit)
        if seen.wanted is None:
            raise SettingsError("The oracle decider needs a reference model: set iter_decider_kwargs.model, or hand over its tokens.")
        wrong = seen.guess != seen.wanted
        chance = torch.rand(seen.count, generator=self.random).to(wrong.device)
        return torch.where(wrong, chance >= self.settings.false_negative_rate, chance < self.settings.false_positive_rate)


class ResidualBlock(nn.Module):
    def __init__(self, width: int, out: int, expansion: int, dropout: float):
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)
        inner = expansion * width
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, out), nn.Dropout(dropout))
        self.dim_change = nn.Linear(width, out) if out != width else None

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.dim_change is None else self.dim_change(x)
        return skip + self.mlp(self.layer_norm(x))


class Backbone(nn.Module):
    def __init__(self, dims: list[int], expansion: int, dropout: float):
        super().__init__()
        widths = [*dims, dims[-1]]
        self.input_projection = nn.Linear(dims[0], dims[0])
        self.blocks = nn.ModuleList(ResidualBlock(a, b, expansion, dropout) for a, b in pairwise(widths))
        self.output_layer = nn.Sequential(nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_projection(x)
        for block in self.blocks:
            x = block(x)
        return self.output_layer(x)


class MLPDecider(Decider):
    """`MLPIterDecider` (spec 2.4), in float32 whatever the backbone's type; names of parameters are the official ones.

    `threshold` is stored as a parameter that takes no gradient and is rounded to the settings' dtype as in the
    official code: 0.9 in bfloat16 decides at 0.8984375 (`effective_threshold`).
    """

    def __init__(self, settings: MLPSettings):
        super().__init__()
        self.settings, self.max_iter = settings, settings.max_iter or 2
        self.taps, self.topk = tuple(settings.hidden_states_layer_nums), settings.topk
        width, first = settings.hidden_states_size, settings.hidden_dims[0]
        self.width = width * len(self.taps)
        self.threshold = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.set_threshold(settings.threshold)
        self.logits_projection = nn.Linear(settings.topk, width)
        self.combined_projection = nn.Linear(self.width + width, first)
        self.backbone = Backbone(settings.hidden_dims, settings.expansion_factor, settings.dropout_rate)
        self.layer_norm_hidden_states = nn.LayerNorm(self.width) if settings.normalize_input else None
        for module in self.backbone.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def set_threshold(self, value: float) -> None:
        """Decide at `value` from now on, rounded to the settings' dtype."""
        self.settings = self.settings.but(threshold=float(value))
        rounded = float(torch.tensor(value, dtype=DTYPES[self.settings.dtype], device="cpu"))
        self.threshold.data.fill_(rounded)
        self.effective_threshold = rounded

    def share(self, other: "MLPDecider") -> None:
        """Decide by the weights of `other` from now on, at a threshold of one's own; SettingsError where its shape is another."""
        free = {"threshold": 0.5, "max_iter": None, "dropout_rate": 0.0, "dtype": "float32", "load_path": ""}
        if self.settings.but(**free) != other.settings.but(**free):
            raise SettingsError("The evaluation decider has another shape than the trained one, so it needs weights of its own: load_path.")
        for name, part in other.named_children():
            setattr(self, name, part)

    def logit(self, seen: Seen) -> Tensor:
        hidden, top = seen.hidden, seen.top.float()
        hidden = top.new_zeros(seen.count, self.width) if hidden is None else hidden.reshape(seen.count, -1).float()
        if self.layer_norm_hidden_states is not None:
            hidden, top = self.layer_norm_hidden_states(hidden), top.softmax(-1)
        with torch.autocast(top.device.type, enabled=False):
            x = self.combined_projection(torch.cat((hidden, self.logits_projection(top)), dim=-1))
            return self.backbone(x).squeeze(-1)

    def again(self, seen: Seen, logit: Tensor) -> Tensor:
        return logit.sigmoid() > self.effective_threshold

    def decide(self, logits: Tensor, hidden_states: Tensor | None, depth: int = 1) -> tuple[Tensor, Tensor]:
        """Decisions and logits (n,) from full cumulative logits (n, V) and all hidden states (n, L + 1, D) or None."""
        taps = None if hidden_states is None else hidden_states[:, list(self.taps)]
        return self(Seen(depth, len(logits), logits.topk(self.topk).values, taps, device=logits.device))


def build_decider(name: str, settings: Settings, *, reference=None, layers: int | None = None, vocab: int | None = None) -> Decider:
    """The decider of an official class name and its checked settings.

    Raises SettingsError where it does not fit the backbone: a hidden state above `layers`, more logits than `vocab`.
    """
    if name == "MLPIterDecider":
        check_fit(settings, layers, vocab)
        return MLPDecider(settings)
    if name == "IterLabelDecider":
        return LabelDecider(settings)
    if name == "OracleDynamicIterDecider":
        return OracleDecider(settings, reference)
    if name == "AlwaysWrapperIterDecider":
        base = decider_settings(settings.base_iter_decider_cls, settings.base_iter_decider_kwargs, settings.max_iter or 2)
        return AlwaysDecider(settings, build_decider(*base, reference=reference, layers=layers, vocab=vocab))
    return NeverDecider(settings.max_iter or 2)


def check_fit(settings: MLPSettings, layers: int | None, vocab: int | None) -> None:
    """Raise SettingsError where the MLP decider asks for hidden states or logits that the backbone does not have."""
    outside = [layer for layer in settings.hidden_states_layer_nums if layers is not None and not 0 <= layer <= layers]
    if outside:
        raise SettingsError(
            f"The decider reads hidden state {outside[0]}, but the backbone has 0 (embeddings) to {layers} (after the norm)."
        )
    if vocab is not None and settings.topk > vocab:
        raise SettingsError(f"The decider reads the {settings.topk} largest logits, but the vocabulary has {vocab} tokens; lower its topk.")
