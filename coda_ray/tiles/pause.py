"""A rest for Ray Data's scheduling loop; on its own, because every read task's process imports it with the settings."""

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

LOOP_PAUSE_S = 0.01


class Pause(ExecutionCallback):
    """Gives the core back to training between two turns of Ray Data's scheduling loop.

    The loop runs in the worker's own process and turns without rest while finished tiles wait for a slower consumer.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Rest for a moment, short against any mini-batch."""
        time.sleep(LOOP_PAUSE_S)
