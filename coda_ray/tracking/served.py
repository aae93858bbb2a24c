"""What MLflow runs to serve an exported model: this file travels with it, beside the plain torch code of `learn/`."""

import json
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.types import Schema, TensorSpec

from coda_ray.learn.exported import read_model


class ServedModel(PythonModel):
    """Tiles (N, C, H, W) uint8 to a table of probabilities, one column per class."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the exported folder, hashes checked."""
        self.model = read_model(context.artifacts["model"])

    # MLflow knows the plain class alone, and warns of any other hint.
    def predict(self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Predict in float32, on the CPU."""
        found = self.model.predict(torch.from_numpy(np.ascontiguousarray(model_input)))
        return pd.DataFrame(found.probabilities.numpy(), columns=self.model.classes)


def signature(description: bytes) -> ModelSignature:
    """Describe what the server takes; the answer is a table with one column per class."""
    channels = len(json.loads(description)["channels"])
    return ModelSignature(inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, channels, -1, -1), name=None)]))


set_model(ServedModel())
