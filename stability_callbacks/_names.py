"""Names of modules and parameters as the user knows them, without the segments that wrappers add."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["plain_name"]

# torch.compile, activation checkpointing and offloading, FSDP1, Lightning Fabric.
_WRAPPER_SEGMENTS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"}
# Of these the segment is a word that may be a name of the user's own.
_WRAPPERS_OF_MODULE = (DataParallel, DistributedDataParallel)


def plain_name(name: str, root: nn.Module | None = None) -> str:
    """A module's, parameter's or buffer's full name without the segments that wrappers add.

    Use it wherever a name is shown, logged, compared or searched by a pattern: then a model bears the same names
    whether it is compiled, checkpointed, sharded, or neither. Only whole segments count: ``my_orig_mod_scale`` stays.

    Args:
        name: The full name, as ``named_modules`` or ``named_parameters`` give it.
        root: The module that gave it. It tells whether a segment ``module`` is that of ``DistributedDataParallel`` or
            ``DataParallel``, or a user's own name. Default None: a user's own, which stays.

    Returns:
        The plain name; empty for the wrapped root.

    Example:
        >>> plain_name("_orig_mod.encoder.0._checkpoint_wrapped_module.weight"), plain_name("my_orig_mod_scale")
        ('encoder.0.weight', 'my_orig_mod_scale')
        >>> model = nn.DataParallel(nn.ModuleDict({"module": nn.Linear(1, 1)}))
        >>> plain_name("module.module.weight", model), plain_name("module.weight")
        ('module.weight', 'module.weight')
    """
    kept = []
    around: nn.Module | None = root
    for segment in name.split("."):
        wraps = segment == "module" and isinstance(around, _WRAPPERS_OF_MODULE)
        if not wraps and segment not in _WRAPPER_SEGMENTS:
            kept.append(segment)
        around = None if around is None else around._modules.get(segment)
    return ".".join(kept)
