"""The models of :mod:`recipes.lstm` under the path that the ``config.yaml`` of older runs has."""

from recipes.models import PixelRNN, SineRNN

__all__ = ["PixelRNN", "SineRNN"]
