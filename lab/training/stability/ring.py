"""The last few resumable checkpoints of a training: written whole or not at all, on probation until they prove healthy."""

import shutil
from collections.abc import Callable
from pathlib import Path

from lab import files

_HEALTHY = "healthy"


class Ring:
    """Checkpoints `checkpoint-<step>` in `folder`: at most `keep` (and three), never without the newest healthy one (distill.md 2C.3).

    A new checkpoint is on probation. It becomes healthy when a validation passes after it, or when training has gone
    `probation` steps beyond it without an alarm. The checkpoint of step 0 is the state before training, hence healthy.
    """

    def __init__(self, folder: Path, keep: int = 3, probation: int = 200):
        self.folder, self.keep, self.probation = Path(folder), keep, probation
        self._waiting: list[int] | None = None  # checkpoints on probation, as far as known

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` lies."""
        return self.folder / f"checkpoint-{step}"

    def steps(self, healthy: bool = False) -> list[int]:
        """Steps of the checkpoints that are there (only the healthy ones if asked), oldest first."""
        found = sorted(int(path.name.removeprefix("checkpoint-")) for path in self.folder.glob("checkpoint-*"))
        return [step for step in found if self.is_healthy(step)] if healthy else found

    def is_healthy(self, step: int) -> bool:
        """Whether the checkpoint of `step` has passed its probation."""
        return (self.path(step) / _HEALTHY).exists()

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """`write(folder)` into a temporary folder, renamed when complete; then the oldest ones go."""
        temporary, self._waiting = self.folder / f".checkpoint-{step}", None
        with files.writing(temporary):
            for torn in self.folder.glob(".checkpoint-*"):
                shutil.rmtree(torn)
            temporary.mkdir(parents=True)
            write(temporary)
            if step == 0:
                (temporary / _HEALTHY).touch()
            self._remove(step)
            temporary.rename(self.path(step))
        self._rotate()
        return self.path(step)

    def settle(self, step: int, validated: bool = False) -> None:
        """Declares healthy what has earned it by `step`; call it only where no alarm stands."""
        if self._waiting is None:
            self._waiting = [saved for saved in self.steps() if not self.is_healthy(saved)]
        for saved in list(self._waiting):
            if validated and saved <= step or saved + self.probation <= step:
                (self.path(saved) / _HEALTHY).touch()
                self._waiting.remove(saved)

    def newest_healthy(self, before: int) -> int | None:
        """The newest healthy step that is at most `before`; if there is none, the oldest healthy one."""
        healthy = self.steps(healthy=True)
        return max((step for step in healthy if step <= before), default=min(healthy, default=None))

    def drop_after(self, step: int) -> list[int]:
        """Removes every checkpoint later than `step`, and says which."""
        late, self._waiting = [saved for saved in self.steps() if saved > step], None
        for saved in late:
            self._remove(saved)
        return late

    def _rotate(self) -> None:
        """Removes the oldest beyond `keep`, but never the newest healthy one, the next one to become healthy, or the newest of all."""
        steps, healthy = self.steps(), self.steps(healthy=True)
        probation = [step for step in steps if step not in healthy]
        safe = {max(healthy, default=None), min(probation, default=None), steps[-1]}
        loose = [step for step in steps if step not in safe]
        for step in loose[: max(0, len(steps) - self.keep)]:
            self._remove(step)

    def _remove(self, step: int) -> None:
        if self.path(step).exists():
            doomed = self.path(step).rename(self.folder / f".checkpoint-{step}-old")
            shutil.rmtree(doomed)
