"""What runs a recipe: the command line, the training of each variant and seed, and Ctrl-C."""

from recipes.runner._callback_set import CallbackSet
from recipes.runner._command_line import from_command_line
from recipes.runner._main import run_recipe
from recipes.runner._recipe import Recipe

__all__ = ["CallbackSet", "Recipe", "from_command_line", "run_recipe"]
