"""A simulated Cell Painting consortium: cells, labs, microscopes, and the bucket they publish (see docs/simulator.md)."""

from coda_ray.jump.simulate.bucket import simulate_site, write_bucket
from coda_ray.jump.simulate.settings import PRESETS, SIMULATOR_VERSION, SimulateSettings

__all__ = ["PRESETS", "SIMULATOR_VERSION", "SimulateSettings", "simulate_site", "write_bucket"]
