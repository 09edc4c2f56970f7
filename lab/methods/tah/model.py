"""Think-at-Hard's model: a backbone, the adapter of its further passes, a decider, and one forward for training and scoring.

Pass 1 is a plain causal pass over right-aligned rows. Only the tokens told to continue are packed and read again; their
hidden states are added to the first pass's, and since the head is linear and has no bias, W(h1 + h2) = z1 + z2: logits are
made in chunks, where and when they are needed (spec 2.1, 8.2). Axes: B rows, T columns, D width, V vocabulary, A packed columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lab.errors import SettingsError, unknown
from lab.latent.edit import Editing
from lab.latent.plan import IGNORE
from lab.methods.tah.config import GENERATORS, TahConfig
from lab.methods.tah.deciders import Decider, MLPDecider, Seen, build_decider
from lab.methods.tah.objective import Decisions, decider_loss, normaliser, token_weights
from lab.methods.tah.passes import Batch, Passes, TahOutput, force_one, pack
from lab.models.cache import duo_causal
from lab.models.decoder import decoder_for
from lab.models.latent_model import LatentModel
from lab.models.lora import GatedLora
from lab.models.step import Out
from lab.models.vocab import best_tokens, linear_cross_entropy, soft_embedding_of, top_logits


class TahModel(LatentModel):
    """A backbone that may read a token again; `tah` holds its checked settings, `parts` the adapter and the decider.

    Args:
        backbone: a transformers causal language model with a bias-free head.
        config: checked settings.
        reference: what the oracle decider asks (see `reference.py`), only where one is configured.
    """

    method = "tah"

    def __init__(self, backbone: nn.Module, config: TahConfig, tokenizer=None, reference=None, source: str = ""):
        if getattr(backbone.get_output_embeddings(), "bias", None) is not None:
            raise SettingsError("The head of this backbone has a bias: logits of two passes are not the head of summed states.")
        lora = config.lora() if config.adapter == "lora" and config.max_iter > 1 else None
        parts = nn.ModuleDict({"decider": _build(backbone, *config.decider(), reference)})
        if lora is not None:
            parts["lora"] = GatedLora(backbone.config, lora.r, lora.lora_alpha, lora.lora_dropout)
        super().__init__(backbone, tokenizer, config, parts, source)
        self.tah, self.config = config, backbone.config
        own = config.eval_iter_decider != "iter_decider" or bool(config.eval_iter_decider_kwargs)
        self.eval_decider = _build(backbone, *config.eval_decider(), reference) if own else None
        self._share_decider()
        self.decoder = decoder_for(backbone, self.lora)
        if lora is not None:
            set_grad(backbone, lora.base_grad)
            set_grad(self.lora, lora.adapter_grad)

    @classmethod
    def build(cls, backbone, tokenizer, settings, source: str = "") -> "TahModel":
        return cls(backbone, TahConfig.check(**settings), tokenizer, source=source)

    def set_threshold(self, value: float) -> None:
        """Let the MLP decider decide at `value` from now on, and remember it in the settings that are saved."""
        deciders = {"iter_decider_kwargs": self.decider, "eval_iter_decider_kwargs": self.eval_decider}
        deciders = {name: decider for name, decider in deciders.items() if isinstance(decider, MLPDecider)}
        if not deciders:
            raise SettingsError(f"Only the MLP decider has a threshold; this model's is {self.tah.iter_decider}.")
        for decider in deciders.values():
            decider.set_threshold(value)
        self._remember(self.tah.but(**{name: {**getattr(self.tah, name), "threshold": float(value)} for name in deciders}))

    def reconfigure(self, **changes) -> "TahModel":
        """A model on the same backbone and adapter, uncopied, under other settings; a decider or adapter of other settings starts fresh."""
        config = self.tah.but(**changes)
        other = TahModel(self.backbone, config, self.tokenizer, source=self.source)
        if self.lora is not None and other.lora is not None and config.lora() == self.tah.lora():
            other.parts["lora"] = self.lora
            other.decoder = decoder_for(self.backbone, self.lora)
        if config.decider() == self.tah.decider():
            other.parts["decider"] = self.decider
            other._share_decider()
        if config.eval_decider() == self.tah.eval_decider() and "eval_decider" in self.parts and "eval_decider" in other.parts:
            other.eval_decider = other.parts["eval_decider"] = self.eval_decider
        return other

    def step_by_transformers(self) -> None:
        raise SettingsError("A token that is read twice stands in slots of several depths, which only lab's own step knows: forward='own'.")

    def _share_decider(self) -> None:
        """Evaluation decides by the trained MLP's weights, unless it names others of its own (which then are a part of the model)."""
        if isinstance(self.eval_decider, MLPDecider):
            trained = self.decider if isinstance(self.decider, MLPDecider) else None
            if trained is not None and self.eval_decider.settings.load_path == trained.settings.load_path:
                self.eval_decider.share(trained)
            else:
                self.parts["eval_decider"] = self.eval_decider

    def _remember(self, config: TahConfig) -> None:
        self.tah, self.settings = config, config.model_dump(mode="json")

    @property
    def lora(self) -> GatedLora | None:
        """The adapter of passes after the first."""
        return getattr(self.parts, "lora", None)

    @property
    def decider(self) -> Decider:
        """The decider that is trained and saved."""
        return self.parts["decider"]

    @property
    def head(self) -> Tensor:
        """The vocabulary head (V, D)."""
        return self.backbone.get_output_embeddings().weight

    @property
    def table(self) -> Tensor:
        """The input embeddings (V, D)."""
        return self.backbone.get_input_embeddings().weight

    @property
    def rule(self):
        """Which slots a query sees, by `iter_attention_mode`."""
        return RULES[self.tah.iter_attention_mode]

    def active_decider(self) -> Decider:
        """The decider in force: the evaluation one outside training where the settings name one."""
        return self.decider if self.training or self.eval_decider is None else self.eval_decider

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        iter_count_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        reference_tokens: Tensor | None = None,
        return_logits: bool = False,
        decider: Decider | None = None,
    ) -> TahOutput:
        """All passes over a batch padded on either side, and the loss where labels are given.

        Args:
            input_ids, attention_mask, labels, iter_count_labels: (B, T); `labels` are shifted inside, iteration labels are
                not: they say how often the token at their own position is read.
            num_items_in_batch: divides summed losses (the Trainer's count of labelled tokens over accumulated batches).
            reference_tokens: (B, T) greedy next token of the reference model at each position, for the oracle decider.
            return_logits: also make (B, T, V) logits. decider: used instead of the model's own.
        """
        decider = decider or self.active_decider()
        if decider.guesses and reference_tokens is None and getattr(decider, "reference", None) is not None:
            reference_tokens = decider.reference.tokens(input_ids, attention_mask)
        batch = Batch.of(input_ids, attention_mask, labels, iter_count_labels, reference_tokens)
        name, loss_settings = self.tah.loss(self.training)
        only_decisions = name == "IterDeciderLoss" and loss_settings.skip_last_iter and not return_logits
        done = self.run(batch, decider, only_decisions, keep_stages=name == "ConsistencyLoss")
        hidden = batch.back(done.total)
        return TahOutput(
            loss=None if labels is None else self._loss(name, loss_settings, batch, done, num_items_in_batch),
            iterations=batch.back(done.iterations),
            hidden=hidden,
            iter_count_labels=None if done.labels is None else batch.back(done.labels),
            logits=self.decoder.logits(hidden) if return_logits else None,
            again=batch.back(done.again),
            decider_logit=batch.back(done.logit),
        )

    def run(
        self,
        batch: Batch,
        decider: Decider,
        only_decisions: bool = False,
        keep_stages: bool = False,
        kv=None,
        edit: Editing | None = None,
    ) -> Passes:
        """The passes over `batch`; with `only_decisions` the last pass is skipped, since nothing is decided after it.

        `kv`: an empty cache to fill for decoding; there the pads on the right have to be marked, since later tokens would see them.
        `edit`: changes what further passes read.
        """
        pos = torch.arange(batch.ids.shape[1], device=batch.ids.device).expand_as(batch.ids)
        valid = None if kv is None or bool(batch.valid.all()) else batch.valid
        kv = self.decoder.grow() if kv is None else kv
        kv.rule = self.rule
        out = self.decoder(self.decoder.embed(batch.ids), pos, kv, valid=valid, taps=decider.taps)
        done = Passes(out.last, torch.ones_like(batch.ids), batch.valid, batch.valid, out)
        for depth in range(1, self.tah.max_iter + 1):
            if keep_stages:
                done.stages.append((done.active, done.total))
            again = self._decide(batch, done, decider, depth)
            again = again if edit is None else edit.allowed(again)
            if not bool(again.any()):
                break
            done.iterations = done.iterations + again
            if only_decisions and depth + 1 == self.tah.max_iter:
                break
            self._pass(done, again, pos, kv, depth, decider.taps, edit)
        return done

    def _pass(self, done: Passes, again: Tensor, pos: Tensor, kv, depth: int, taps: tuple[int, ...], edit: Editing | None) -> None:
        """Pass `depth` + 1 over the tokens told to continue, packed; its states join the total."""
        index, real = pack(again)
        fresh, patch = self._next_input(done, again), None
        if edit is not None:
            fresh, patch = edit.block(fresh, real)
        x = fresh.new_zeros(*index.shape, fresh.shape[-1]).masked_scatter(real.unsqueeze(-1), fresh)
        how = {"valid": real, "depth": depth, "lora_gate": self.lora is not None, "taps": taps, "patch": patch}
        out = self.decoder(x, pos.gather(1, index) * real, kv, **how)
        additive = self.tah.output_updater == "AdditiveLogitsUpdater"
        done.total = done.total.index_put(again.nonzero(as_tuple=True), out.last[real].to(done.total.dtype), accumulate=additive)
        done.active, done.real, done.out = again, real, out

    def _next_input(self, done: Passes, again: Tensor) -> Tensor:
        updater = self.tah.updater()
        if updater.use_hidden_states:
            return done.out.last[done.real][again[done.active]]
        return soft_embedding_of(done.total[again], self.head, self.table, updater.topk)

    def _decide(self, batch: Batch, done: Passes, decider: Decider, depth: int) -> Tensor:
        """Which tokens (B, T) continue after pass `depth`; keeps decisions and labels in `done`."""
        active, states = done.active, done.total[done.active]
        labels = self._labels(batch, done, states, depth)
        chosen, logit = decider(self.see(decider, states, done.out, done.real, depth, labels, batch.reference, active))
        if depth >= self.tah.max_iter:
            chosen = torch.zeros_like(chosen)
        else:
            chosen = force_one(chosen, None if batch.targets is None else batch.targets[active])
        wanted = torch.full_like(chosen, IGNORE, dtype=torch.long) if labels is None else labels
        done.decisions.append(Decisions(depth, logit, wanted))
        again = torch.zeros_like(active).masked_scatter(active, chosen)
        if depth == 1:
            done.again = again
            done.logit = torch.full(active.shape, torch.nan, device=logit.device).masked_scatter(active, logit.detach().float())
        return again

    def see(
        self,
        decider: Decider,
        states: Tensor,
        out: Out,
        real: Tensor,
        depth: int,
        labels: Tensor | None = None,
        reference: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Seen:
        """What `decider` looks at for n tokens with summed states (n, D), which stand where `real` is set in the columns of `out`."""
        seen = Seen(depth, len(states), labels=labels, device=states.device)
        if depth >= decider.max_iter:
            return seen
        if decider.topk:
            seen.top = top_logits(states, self.head, decider.topk)[0]
        if decider.taps:
            seen.hidden = torch.stack([out.taps[layer][real] for layer in decider.taps], dim=1)
        if decider.guesses:
            seen.guess = best_tokens(states, self.head)
            seen.wanted = None if reference is None else reference[active]
        return seen

    def _labels(self, batch: Batch, done: Passes, states: Tensor, depth: int) -> Tensor | None:
        """Iteration labels (n,) of the active tokens, made as the settings say; max-merged into `done.labels`."""
        kind, cap = GENERATORS[self.tah.iter_label_generator], self.tah.max_iter
        if kind == "data":
            done.labels = None if batch.wanted is None else batch.wanted.clamp(min=0)
            return None if batch.wanted is None else batch.wanted[done.active]
        if kind == "max":
            labels = torch.full((len(states),), cap, device=states.device)
        elif batch.targets is None:
            return None
        else:
            targets = batch.targets[done.active]
            labels = torch.where(best_tokens(states, self.head) != targets, depth + 1, depth).clamp(max=cap)
            labels = torch.where(targets == IGNORE, IGNORE, labels)
        merged = torch.zeros_like(batch.ids).masked_scatter(done.active, labels.clamp(min=0))
        done.labels = merged if done.labels is None else torch.maximum(done.labels, merged)
        return labels

    def _loss(self, name: str, settings, batch: Batch, done: Passes, num_items) -> Tensor:
        if name == "IterDeciderLoss":
            items = num_items if settings.loss_scaling == "official" else None
            return decider_loss(done.decisions, settings, self.tah.max_iter, items, positions=batch.ids.numel())
        where = (batch.targets != IGNORE) & batch.valid
        if name == "ConsistencyLoss":
            return self._consistency(batch, done, where, num_items)
        weights = token_weights(done.iterations[where], settings) if self.training else None
        summed, _ = linear_cross_entropy(done.total[where], self.head, batch.targets[where], weights)
        return summed / normaliser(weights, int(where.sum()), num_items)

    def _consistency(self, batch: Batch, done: Passes, where: Tensor, num_items) -> Tensor:
        summed = torch.zeros((), device=batch.ids.device)
        for active, total in done.stages:
            own = where & active
            weights = 1.0 / done.iterations[own]
            summed = summed + linear_cross_entropy(total[own], self.head, batch.targets[own], weights)[0]
        return summed / normaliser(None, int(where.sum()), num_items)


def _build(backbone: nn.Module, name: str, settings, reference) -> Decider:
    shape = backbone.config
    return build_decider(name, settings, reference=reference, layers=shape.num_hidden_layers, vocab=shape.vocab_size)


RULES = {
    "duo": duo_causal,
    "root": lambda pos, depth, slot_pos, slot_depth: (slot_pos <= pos) & (slot_depth <= 0),
    "same_iter": lambda pos, depth, slot_pos, slot_depth: (slot_pos <= pos) & (slot_depth == depth),
}


def set_grad(module: nn.Module, wanted: bool) -> None:
    """Let the parameters of `module` learn, or not."""
    for parameter in module.parameters():
        parameter.requires_grad_(wanted)


def freeze(model: TahModel, components: Sequence[str]) -> list[str]:
    """Freeze parts named by dotted path (`freeze_component` of the recipes); the names of all parameters still learning.

    A leading `model.` is optional; `simple_base_model` is the official name of backbone and adapter together.
    Raises SettingsError for a path that does not exist.
    """
    names = [name for name, _ in model.named_modules() if name]
    for component in components:
        path = component.removeprefix("model.") if component not in names else component
        if path == "simple_base_model":
            parts = [part for part in (model.backbone, model.lora) if part is not None]
        elif path in names:
            parts = [model.get_submodule(path)]
        else:
            raise unknown("component to freeze", component, ["simple_base_model", *names])
        for part in parts:
            set_grad(part, False)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def standard(backbone: nn.Module) -> TahModel:
    """A backbone as a one-pass model: the "Standard" baseline through the same trainer and evaluation."""
    return TahModel(backbone, TahConfig.check(max_iter=1, adapter="none", iter_decider="TrivialIterDecider"))
