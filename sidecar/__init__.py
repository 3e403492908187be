"""A sidecar for one LLM inference engine: progress verdicts, load in model units, images off the hot path."""

__version__ = "0.2.0"
