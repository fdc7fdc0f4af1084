"""Runnable demonstrations of failures and their cures by `stability_callbacks`.

``python -m recipes.lstm`` trains a network that fails, and the same network healed; ``python -m recipes.autograd``
shows the formulas that bad gradients come from. Each lists its options with ``--help``. Nothing in the package imports
this folder.
"""
