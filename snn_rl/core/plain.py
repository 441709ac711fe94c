"""A copy of an ANN in which every weight is a plain parameter that belongs to one layer.

Conversion rescales weights in place, so each must be stored where the layer reads it. A weight that is computed at each
call (weight norm, spectral norm, an orthogonal or any other parametrization, a pruning mask) is computed once and
stored; a parameter that two layers share becomes one parameter in each. The copy computes what the ANN computes in
evaluation mode.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# What PyTorch's older functions leave on a layer: a hook that computes a weight before each call.
WEIGHT_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
HOOKS = {"_forward_pre_hooks": "forward pre-hook", "_forward_hooks": "forward hook"}
# Wrappers by the name of their class: several live in modules that are slow to import.
WRAPPERS = {
    "DataParallel": "the network inside it, its .module",
    "DistributedDataParallel": "the network inside it, its .module",
    "FullyShardedDataParallel": "the network as it was before it was sharded",
    "OptimizedModule": "the network that torch.compile got, its ._orig_mod",
}


@torch.no_grad()
def plain_copy(ann: nn.Module) -> nn.Module:
    """A deep copy of ``ann`` in evaluation mode, with plain and unshared weights; ``ann`` stays as it was.

    Raises:
        ValueError: no module, a wrapper around a network, a scripted network, a layer with a forward hook, a lazy layer
            that has not seen an input yet, or a module that cannot be copied.
    """
    if not isinstance(ann, nn.Module):
        raise ValueError(f"the network must be a torch.nn.Module, got {type(ann).__name__}")
    for path, module in ann.named_modules():
        _refuse(path, module)
    plain = evaluation_copy(ann)
    # All are read before any is stored: a module may share its parameters with others.
    for module, tensors in [(module, _weights(module)) for module in plain.modules()]:
        _store(module, tensors)
        module._backward_hooks.clear()  # they watch the ANN's training
        module._backward_pre_hooks.clear()
    return plain


def evaluation_copy(ann: nn.Module) -> nn.Module:
    """A deep copy of ``ann`` in evaluation mode. Raises ValueError for a module that cannot be copied."""
    # A weight that a hook computed is no leaf of the autograd graph, and deepcopy refuses those.
    values = (value for module in ann.modules() for value in vars(module).values())
    memo: dict[int, Any] = {id(v): v.detach().clone() for v in values if isinstance(v, Tensor) and not v.is_leaf}
    try:
        return copy.deepcopy(ann, memo).eval()
    except Exception as error:  # whatever an attribute of the user's own module raises
        raise ValueError(f"cannot copy {type(ann).__name__}: {type(error).__name__}: {first_line(error)}") from error


def _refuse(path: str, module: nn.Module) -> None:
    name = type(module).__name__
    where = f"layer {path!r}, a {name}" if path else f"the network, a {name}"
    if name in WRAPPERS:
        raise ValueError(f"cannot convert {where}: pass {WRAPPERS[name]}")
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"cannot convert {where}: pass the network from before torch.jit.script or torch.jit.trace")
    if any(p is not None and is_lazy(p) for p in module._parameters.values()):
        raise ValueError(f"cannot convert {where}: its weights have no shape yet; run the network once on an input")
    for attribute, kind in HOOKS.items():
        for hook in getattr(module, attribute).values():
            if not isinstance(hook, WEIGHT_HOOKS):
                raise ValueError(
                    f"cannot convert {where}: it has a {kind}, which could change what it computes; remove the hook, "
                    "convert, and set it again"
                )


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters, and the parametrized buffers, that ``module`` itself computes with; each with its own memory."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            tensors[name] = _parameter(parameter, parameter.requires_grad)
    for hook in _weight_hooks(module):
        hook(module, ())  # the last call may have computed the weight from other parts
        tensors[_target(hook)] = _parameter(getattr(module, _target(hook)), True)
    if parametrize.is_parametrized(module):
        for name, computed in module.parametrizations.items():  # type: ignore[union-attr, operator]
            own = list(computed.parameters(recurse=False))
            value = getattr(module, name)
            tensors[name] = _parameter(value, any(p.requires_grad for p in own)) if own else value.detach().clone()
    return tensors


def _parameter(value: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad)


def _store(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Take away what computes the weights of ``module``, and keep ``tensors`` in their place."""
    for hook in _weight_hooks(module):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, _target(hook))
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, _target(hook))
        else:
            prune.remove(module, _target(hook))
    names = set(module._parameters)  # without the parts of the weights that hooks computed
    if parametrize.is_parametrized(module):
        names |= set(module.parametrizations)  # type: ignore[arg-type]
        # Not by `remove_parametrizations`, which changes the class of the module, and so of every copy of it.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
    for name in names & tensors.keys():
        own: dict[str, Any] = module._parameters if isinstance(tensors[name], nn.Parameter) else module._buffers
        own[name] = tensors[name]


def _weight_hooks(module: nn.Module) -> list[Any]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WEIGHT_HOOKS)]


def _target(hook: Any) -> str:
    """The name of the weight that a hook computes."""
    return str(hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name)


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]
