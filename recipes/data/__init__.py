"""The data modules of the recipes; ``--data`` takes these and any other LightningDataModule by class path."""

from recipes.data._images import Digits, ImageData, MNIST5k
from recipes.data._loader import ResumableLoader, shuffled_batches
from recipes.data._poison import Poison, poison_batches
from recipes.data._sine import SineWaves
from recipes.data._text import Text

__all__ = [
    "Digits",
    "ImageData",
    "MNIST5k",
    "Poison",
    "ResumableLoader",
    "SineWaves",
    "Text",
    "poison_batches",
    "shuffled_batches",
]
