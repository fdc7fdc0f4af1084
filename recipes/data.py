"""The data modules of the recipes; ``--data`` takes these and any other LightningDataModule by class path."""

from recipes._images import Digits, ImageData, MNIST5k
from recipes._sine import SineWaves
from recipes._text import Text

__all__ = ["Digits", "ImageData", "MNIST5k", "SineWaves", "Text"]
