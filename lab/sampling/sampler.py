"""How the samples of a question come to differ, as one object that sampling, annotation and search share (`latenttts.md` 7.3)."""

from typing import Any, Literal

from pydantic import model_validator

from lab.config import Settings
from lab.errors import SettingsError
from lab.latent.policy import Policy
from lab.latent.sampling import Sampling
from lab.models.latent_model import LatentModel
from lab.sampling.stochastic import REGIMES, DropoutRegime, Noise, Noisy, dropout

RULES = {"coconut": "latenttts-coconut", "codi": "latenttts-codi", "colar": "latenttts-colar"}


class Sampler(Settings):
    """Noise on thoughts, Monte Carlo dropout, or the model's own randomness.

    Attributes:
        by: `noise`, `dropout`, or `own`: CoLaR's latent head, or drawn tokens at `temperature` for methods that think exactly.
        strength: sigma of the noise, or the dropout probability.
        relative, where: see `Noise`. regime: see `lab.sampling.stochastic.REGIMES`.
        temperature: of the answer's tokens; 0 is greedy, as published.
    """

    by: Literal["noise", "dropout", "own"] = "noise"
    strength: float = 0.6
    relative: bool = False
    where: Literal["after", "before"] = "after"
    regime: str = "thoughts"
    temperature: float = 0.0
    seed: int = 0

    @model_validator(mode="after")
    def _makes_a_difference(self) -> "Sampler":
        if self.by != "own" and not self.strength > 0:
            raise ValueError(f"{self.by} of {self.strength:g} makes all samples equal; give a strength above 0, or ask for one sample")
        if self.by == "dropout" and self.strength >= 1:
            raise ValueError(f"dropout of {self.strength:g} leaves nothing; give a probability below 1")
        if self.by == "dropout" and self.regime not in REGIMES:
            raise ValueError(f"unknown dropout regime {self.regime!r}; known: {', '.join(REGIMES)}")
        return self

    @property
    def label(self) -> str:
        """What figures and folders call it."""
        return "own" if self.by == "own" else f"{self.by} {self.strength:g}"

    def wrap(self, policy: Policy) -> Policy:
        """The policy with this noise on its thoughts (itself for the other kinds)."""
        if self.by != "noise":
            return policy
        return Noisy(policy, Noise(sigma=self.strength, relative=self.relative, where=self.where))

    def masks(self, model: LatentModel, count: int | None) -> DropoutRegime | None:
        """The dropout regime for `count` thoughts (None = open); SettingsError for a model without dropout sites.

        Where thoughts stand mixed into the words (DTT), words are read under dropout as thoughts are.
        """
        if self.by != "dropout":
            return None
        settings = dropout(self.regime, self.strength, model.decoder)
        return DropoutRegime(settings.but(answer=True) if model.method == "dtt" else settings, count)

    @property
    def completing(self) -> "Sampler":
        """What completes a prefix in annotation: itself, with dropout on through the answer where the released script has it (2.6)."""
        return self.but(regime="annotation-rollouts") if self.regime == "annotation" else self

    def options(self, model: LatentModel, thoughts: int = 0) -> dict[str, Any]:
        """What `model.generate` must be told, beside its budgets; `thoughts` 0 = what the model was trained with."""
        told: dict[str, Any] = {"seed": self.seed, "sampling": Sampling(temperature=self.temperature)}
        if thoughts:
            told["thoughts"] = thoughts
        if self.by == "noise":
            told["wrap"] = self.wrap
        if self.by == "dropout":
            told["dropout"] = self.masks(model, fixed_count(model, thoughts))
        if model.method == "colar" and self.by != "own":
            told |= {"latent_temperature": 0.0, "end_temperature": 0.0}
        return told


def fixed_count(model: LatentModel, thoughts: int = 0) -> int | None:
    """How many thoughts every row makes; None where the model decides itself."""
    if model.method == "colar":
        return None
    if thoughts:
        return thoughts
    if model.method == "coconut":
        from lab.methods.coconut.config import thoughts_at

        return thoughts_at(model.config.stage, None, model.config)
    return model.config.num_latent if model.method == "codi" else getattr(model.config, "fixed_count", None)


def thinker(model: LatentModel, count: int | None, sampler: Sampler | None = None) -> Policy:
    """The policy that makes `count` thoughts (None = as many as the model wants) and draws what `sampler` does; None: nothing.

    Raises SettingsError for a method whose thoughts do not stand at positions of their own before the answer.
    """
    words = Sampling(temperature=0.0 if sampler is None else sampler.temperature)
    if model.method == "colar":
        from lab.methods.colar.policy import ColarPolicy

        own = float(sampler is not None and sampler.by == "own")
        policy = ColarPolicy(model, words, own, own)
    elif model.method == "coconut":
        from lab.methods.coconut import policy as coconut

        policy = coconut.policy(model.decoder, model.config, count, words)
    elif model.method == "codi":
        from lab.methods.codi import policy as codi

        policy = codi.policy(model, count, words)
    elif model.method == "adaptive":
        from lab.methods.adaptive import policy as adaptive

        policy = adaptive.policy(model, words, count=count)
    else:
        raise SettingsError(f"Method {model.method!r} makes no thoughts before its answer that could be scored one by one; vote instead.")
    return policy if sampler is None else sampler.wrap(policy)


def placeholder(model: LatentModel) -> int:
    """The id that stands for a thought where a row is written as ids."""
    for name in ("latent_id", "pad_id"):
        if (found := getattr(model.config, name, -1)) >= 0:
            return found
    return 0


def fingerprint(model: LatentModel) -> str:
    """A short name of a model's shape and weights, the same wherever it was loaded from."""
    from lab.files import digest

    table = model.backbone.get_input_embeddings().weight.detach().float()
    few = table[:: max(1, len(table) // 16), :: max(1, table.shape[1] // 16)]
    return digest(model.method, list(table.shape), [round(value, 5) for value in few.flatten().tolist()])
