"""What a job sees and shows of a stage that another job is at: how far it is, and its result."""

from collections.abc import Callable
from typing import Any

from coda_ray.progress import Tell
from coda_ray.storage import Folder
from coda_ray.training.checkpoints import newest_step

# Folder in which a stage that does not train leaves what each of its steps found.
PARTS = "parts"


class Follower:
    """Looks for the result of one stage, and shows how far the other job is.

    Parameters
    ----------
    title
        Of the stage, for people.
    look
        Reads the facts of the finished stage; None while it is unfinished.
    folder
        Where the other job leaves what it has done so far.
    steps
        Steps of the stage; 0 where they are not counted.
    tell
        Receives how far the other job is; None prints that.

    Attributes
    ----------
    facts
        What the last look found.
    waited
        Whether there was another job.
    """

    def __init__(
        self, title: str, look: Callable[[], dict[str, Any] | None], folder: Folder, steps: int, tell: Tell | None
    ) -> None:
        self._title, self._look, self._folder, self._steps, self._tell = title, look, folder, steps, tell
        self._shown = 0
        self.facts: dict[str, Any] | None = None
        self.waited = False

    def met(self, holder: str) -> None:
        """Say who the other job is."""
        self.waited = True
        print(f"{self._title}: {holder} is at work on it; this job waits, and takes its result", flush=True)

    def finished(self) -> bool:
        """Whether the stage is finished; where it is not, and another job is at it, show how far that is."""
        self.facts = self._look()
        if self.facts is None and self.waited:
            self._show()
        return self.facts is not None

    def _show(self) -> None:
        """Show the newest step that was written, once."""
        step = newest_step(self._folder) or len(self._folder.names(PARTS))
        if step == self._shown:
            return
        self._shown = step
        if self._tell is None:
            print(f"{self._title}: the other job is at step {step}{f'/{self._steps}' if self._steps else ''}", flush=True)
        elif self._steps:
            self._tell(min(step, self._steps), self._steps)
