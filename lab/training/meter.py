"""How much a stretch of training reads: columns through the backbone, counted wherever a method's forward passes go, and time."""

import time
from typing import Any

from torch import nn

from lab.models.decoder import Decoder


class Meter:
    """While it is on (`with meter:`), counts rows × columns of every decoder step (padding included), wall and CPU seconds."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self.cpu_seconds = 0, 0.0, 0.0

    def __enter__(self) -> "Meter":
        self._began, self._original = (time.monotonic(), time.process_time()), Decoder.__call__
        meter, original = self, Decoder.__call__

        def counted(decoder: Decoder, x: Any, *args: Any, **options: Any) -> Any:
            meter.tokens += x.shape[0] * x.shape[1]
            return original(decoder, x, *args, **options)

        Decoder.__call__ = counted
        return self

    def __exit__(self, *_: Any) -> None:
        Decoder.__call__ = self._original
        wall, cpu = self._began
        self.seconds += time.monotonic() - wall
        self.cpu_seconds += time.process_time() - cpu

    def watch(self, stem: nn.Module) -> None:
        """Counts the forwards of a transformers model too, for a method that calls it."""
        stem.register_forward_pre_hook(self._read, with_kwargs=True)

    def _read(self, _: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        ids, x = inputs.get("input_ids"), inputs.get("inputs_embeds")
        self.tokens += ids.numel() if x is None else x.shape[0] * x.shape[1]
