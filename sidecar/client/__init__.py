"""The public client: `from sidecar.client import Client`. It needs only aiohttp and numpy."""

from sidecar.client.preprocess import Client, ImageLayout, Preprocessed, PreprocessError

__all__ = ["Client", "ImageLayout", "PreprocessError", "Preprocessed"]
