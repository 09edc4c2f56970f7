"""A pass over a model of some shape and back: what it keeps in memory, counted without numbers, and how long it takes on this machine.

Both are found on one and on two layers of the shape and scaled to all.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

Key = tuple[str, int, tuple]  # backbone, layers dropped, shape of a toy
SMALL_VOCABULARY = 1024  # of a timed pass


def configured(key: Key, layers: int = 0) -> Any:
    """The configuration of a backbone; with `layers`, of so many of its layers alone."""
    from lab.models.plan import planned_config

    backbone, pruned, shape = key
    config = planned_config(backbone, pruned=pruned, **dict(shape))
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1] * layers
    return config


# ---- what is kept ----


def activations(key: Key, rows: int, tokens: int, half: bool = False, frozen: bool = False, said: float = 1.0) -> float:
    """Bytes that a forward pass of `rows` × `tokens` keeps for its backward pass, counted on tensors without numbers."""
    return _of_all_layers(_kept, key, rows, tokens, half, frozen, said)


def _of_all_layers(measure: Callable[..., float], key: Key, *asked: Any) -> float:
    """What `measure` would find for the whole model, from one and two layers of it."""
    layers = configured(key).num_hidden_layers
    one = measure(key, 1, *asked)
    return one + (layers - 1) * max(measure(key, 2, *asked) - one, 0.0) if layers > 1 else one


@cache
def _kept(key: Key, layers: int, rows: int, tokens: int, half: bool, frozen: bool, said: float) -> float:
    import torch
    from torch._subclasses import FakeTensorMode

    config = configured(key, layers)
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode():
        model = _model(config, torch.bfloat16 if half else torch.float32, frozen)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = _loss(model, torch.zeros(rows, tokens, dtype=torch.long), said)  # noqa: F841 - its graph holds what is counted
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


def _model(config: Any, dtype: Any = None, frozen: bool = False) -> Any:
    """Of a configuration; `frozen`: gradients go through it, to what is read, and stop nowhere."""
    import torch

    from lab.models.backbones import causal_class

    config.use_cache, before = False, torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        model = causal_class(config)(config)
    finally:
        torch.set_default_dtype(before)
    if frozen:
        model.requires_grad_(False).get_input_embeddings().register_forward_hook(lambda module, ids, read: read.requires_grad_())
    return model


def _loss(model: Any, ids: Any, said: float = 1.0) -> Any:
    import torch

    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]  # whole, so that nobody looks for pads in it
    few = max(1, round(said * ids.shape[1]))
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=few).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -few:].flatten(), reduction="sum")


# ---- time ----


def passed(key: Key, rows: int, tokens: int, half: bool, frozen: bool, said: float = 1.0) -> float:
    """Seconds of a pass of the whole model over `rows` × `tokens` and back.

    One and two layers are timed on as many tokens as take a second or so, with a small vocabulary; the head counts as the layers do,
    by its weights.
    """
    import torch

    from lab.models.backbones import parameter_count

    config = configured(key)
    with torch.device("meta"):
        layer = (parameter_count(_model(configured(key, 2))) - parameter_count(_model(configured(key, 1)))) or 1
    most = max(1, int((1e13 if torch.cuda.is_available() else 3e10) / (6 * layer)))
    wide = min(tokens, most)
    some = max(1, min(rows, most // wide))
    one, two = (_timed(key, layers, some, wide, half, frozen) for layers in (1, 2))
    each = max(two - one, 0.1 * one)
    head = said * max(0, config.vocab_size - SMALL_VOCABULARY) * config.hidden_size / layer
    return rows * tokens / (some * wide) * (max(one - each, 0.0) + (config.num_hidden_layers + head) * each)


@cache
def _timed(key: Key, layers: int, rows: int, tokens: int, half: bool, frozen: bool) -> float:
    import torch

    config = configured(key, layers)
    config.vocab_size = min(config.vocab_size, SMALL_VOCABULARY)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = _model(config, frozen=frozen).train()
    model.to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01)  # any number will do
    with device:
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        return fastest(lambda: _pass(model, ids, half))


def _pass(model: Any, ids: Any, half: bool) -> None:
    import torch

    with torch.autocast(ids.device.type, torch.bfloat16, enabled=half):
        loss = _loss(model, ids)
    loss.backward()
    model.zero_grad()


@cache
def update_seconds() -> float:
    """Seconds of clipping and AdamW for each parameter that learns, measured on four million."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(1 << 22, device="cuda" if torch.cuda.is_available() else "cpu"))
    weight.grad, optimizer = torch.zeros_like(weight), torch.optim.AdamW([weight], fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()

    return fastest(update) / weight.numel()


def fastest(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of three; short work is timed more often, as something else may run beside it."""
    import torch

    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.3:
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
