"""Weights of other libraries in our names, and ours in theirs."""

from pathlib import Path

from mto_jax.exchange import files, sources
from mto_jax.exchange.model import Weights

__all__ = ['Weights', 'read']


def read(path: str | Path, *, key: str = '', **hints) -> Weights:
    """The weights in a foreign file (.safetensors, .pth, .pt, .bin) or a Hugging Face or timm folder.

    Args:
      key: as for `files.load`.
      hints: as in `sources.Hints`: what shapes cannot tell (`heads`), or is to be another than the file says.

    Raises:
      UserError: in one line, for anything that is not the weights of a known family. Nothing in a file is run.
    """
    return sources.weights(files.load(path, key), sources.Hints(**hints))
