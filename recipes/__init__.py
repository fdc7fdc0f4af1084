"""Runnable demonstrations: each trains a network that fails, and the same network healed by `stability_callbacks`.

``python -m recipes.lstm --help`` lists the options of the first one. Nothing in the package imports this folder.
"""
