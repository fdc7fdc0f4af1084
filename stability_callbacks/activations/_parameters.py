"""The parameters that a module owns, as its ``forward`` sees them, and whether they can be reached."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["own_parameters", "refuse_unreachable"]

OwnParameter = tuple[str, tuple[Tensor, ...], ParametrizationList | None]


def own_parameters(module: nn.Module) -> Iterator[OwnParameter]:
    """The parameters that a module itself owns, as its ``forward`` sees them: a parametrized weight is one.

    Yields:
        The attribute, the tensors that hold it, and what computes it from them; None for an ordinary parameter.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
        >>> [(name, len(tensors)) for name, tensors, _ in own_parameters(layer)]
        [('weight', 2), ('bias', 1)]
    """
    # Not by `getattr`: wrappers pass that on to what they wrap, which is asked by itself.
    for attribute, parametrization in (module._modules.get("parametrizations") or nn.ModuleDict()).named_children():
        if isinstance(parametrization, ParametrizationList):
            names = (
                ["original"] if parametrization.is_tensor else [f"original{i}" for i in range(parametrization.ntensors)]
            )
            yield attribute, tuple(getattr(parametrization, name) for name in names), parametrization
    for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield attribute, (parameter,), None


def refuse_unreachable(model: nn.Module) -> None:
    """Raise where parameters have no values to read or write, before anything is done with them.

    Raises:
        ValueError: If a parameter is on the meta device, or sharded in a way that hides its shape.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not is_lazy(parameter):
            raise ValueError(
                f"`model` must have no parameters on the meta device, got {name!r}: give them storage first, with"
                " `model.to_empty(device=...)`; Lightning does so before `on_fit_start`"
            )
        if hasattr(parameter, "ds_id") or type(parameter).__name__ == "FlatParameter":
            raise ValueError(
                f"`model` must not be sharded by FSDP1 or DeepSpeed ZeRO-3, got {name!r}, whose shape is lost:"
                " apply the policy before the model is wrapped, or shard it with `torch.distributed.fsdp.fully_shard`"
            )
