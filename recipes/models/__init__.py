"""The networks of the recipes: plain LightningModules that know nothing of the callbacks."""

from recipes.models._blocks import AdditiveCoupling, PlainBlock, ResidualBlock, Reversible, block
from recipes.models._convnet import ConvNet, ResNet18
from recipes.models._mlp import DeepMLP
from recipes.models._recurrent import CellName, PixelRNN, SineRNN
from recipes.models._training import ImageClassifier, ShardableModule
from recipes.models._transformer import CharTransformer

__all__ = [
    "AdditiveCoupling",
    "CellName",
    "CharTransformer",
    "ConvNet",
    "DeepMLP",
    "ImageClassifier",
    "PixelRNN",
    "PlainBlock",
    "ResNet18",
    "ResidualBlock",
    "Reversible",
    "ShardableModule",
    "SineRNN",
    "block",
]
