"""Looking at the outputs of modules: the walk over a model's modules, hooks on them, and statistics. Pure PyTorch.

Example:
    >>> import torch
    >>> from stability_callbacks.activations import Moments, OutputHooks, floating_tensors, named_modules
    >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Flatten())
    >>> seen = {}
    >>> def observe(call):
    ...     seen[call.name] = Moments.pooled([Moments.of(each) for each in floating_tensors(call.output)])
    >>> with OutputHooks(named_modules(model), observe):
    ...     _ = model(torch.tensor([[0.0], [2.0]]))
    >>> {name: (moments.mean, moments.std) for name, moments in seen.items()}
    {'0': (1.0, 1.0), '1': (1.0, 1.0), '': (1.0, 1.0)}
"""

from __future__ import annotations

from stability_callbacks.activations._hooks import ModuleCall, OutputHooks, eager, floating_tensors
from stability_callbacks.activations._module_stack import ModuleStack
from stability_callbacks.activations._modules import modules_by_name, named_modules
from stability_callbacks.activations._moments import Moments, measure_moments, precise
from stability_callbacks.activations._parameters import own_parameters, refuse_unreachable

__all__ = [
    "ModuleCall",
    "ModuleStack",
    "Moments",
    "OutputHooks",
    "eager",
    "floating_tensors",
    "measure_moments",
    "modules_by_name",
    "named_modules",
    "own_parameters",
    "precise",
    "refuse_unreachable",
]
