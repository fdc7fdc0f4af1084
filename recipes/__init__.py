"""Runnable demonstrations of failures and their cures by `stability_callbacks`.

``python -m recipes.mlp``, ``resnet``, ``lstm`` and ``transformer`` train networks that fail, and the same networks
healed; ``gradient_flow`` measures gradients before any training; ``autograd`` shows the formulas that bad gradients
come from. Each lists its options with ``--help``. Nothing in the package imports this folder.
"""
