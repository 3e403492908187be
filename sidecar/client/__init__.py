"""The public client: `from sidecar.client import Client`. It needs aiohttp and numpy, and nothing of the sidecar's other parts."""

from sidecar.client.preprocess import Client, ImageLayout, Preprocessed, PreprocessError

__all__ = ["Client", "ImageLayout", "PreprocessError", "Preprocessed"]
