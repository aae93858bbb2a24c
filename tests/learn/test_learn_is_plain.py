"""The learn room stands alone: no cluster, tracking, table or storage library comes in with it."""

import json
import pkgutil
import subprocess
import sys

import coda_ray.learn

UNWANTED = ["ray", "mlflow", "pandas", "fsspec", "pydantic"]


def test_importing_every_module_brings_in_none_of_the_unwanted() -> None:
    modules = [f"coda_ray.learn.{module.name}" for module in pkgutil.iter_modules(coda_ray.learn.__path__)]
    assert len(modules) >= 10
    code = f"""
import importlib, json, sys
for name in {modules!r}:
    importlib.import_module(name)
print(json.dumps([name for name in {UNWANTED!r} if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
