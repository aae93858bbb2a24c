"""A rest for Ray Data's scheduling loop; on its own, because every read task's process imports it with the settings."""

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

WANTED_PAUSE_S = 0.01
"""While the consumer has nothing to take: short against any mini-batch."""
WAITING_PAUSE_S = 0.1
"""While finished tiles wait for a slower consumer: nothing is late, and each turn costs the training thread some milliseconds."""


class Pause(ExecutionCallback):
    """Gives the core back to training between two turns of Ray Data's scheduling loop.

    The loop runs in the worker's own process and turns without rest while finished tiles wait for a slower consumer.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Rest for a moment."""
        time.sleep(WANTED_PAUSE_S if executor._consumer_idling() else WAITING_PAUSE_S)
