"""Run a container within the memory it is given: `Engine` is the whole public API (see README.md)."""

from runtime.engine import Engine
from runtime.sampling import SamplingOptions
from runtime.session import Session
from runtime.stats import Stats

__all__ = ["Engine", "SamplingOptions", "Session", "Stats"]
