"""The names of a module's weights, as `compile_package` records them in the package.

An update brings the module's `state_dict()`. What of it the compiled graph uses, and under which of
several names, only the module and its exported program tell. torch is imported late: this file is
read where nothing is compiled.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from aoti_sched.model.specs import WeightName

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

DIGEST_LIMIT = 1 << 20
"""Bytes.

Inductor compiles values into the code that have few elements, or one value in all of them.
"""


def names_of(module: torch.nn.Module, program: ExportedProgram) -> tuple[WeightName, ...]:
    """Return every name of the module's state, in its order, as the program uses it.

    Two names are of one tensor when they share its storage, offset, shape and strides: the compiled
    model has one constant for both.
    """
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    persistent = module.state_dict(keep_vars=True)
    used = _used(program)
    first: dict[object, str] = {}
    groups: dict[str, str] = {}
    for name, tensor in tensors.items():
        groups[name] = first.setdefault(_identity(tensor), name)
    used_groups = {groups[name] for name in used if name in groups}
    names = [
        WeightName(
            name,
            same_as="" if groups[name] == name else groups[name],
            persistent=name in persistent,
            used=groups[name] in used_groups,
            digest=digest_of(tensor) if groups[name] in used_groups else "",
        )
        for name, tensor in tensors.items()
    ]
    return (*names, *(WeightName(name, used=False) for name in persistent if name not in tensors))


def digest_of(tensor: torch.Tensor) -> str:
    """Return a digest of dtype, shape and values; "" for a large or opaque tensor."""
    import ctypes

    import torch

    if (
        tensor.layout != torch.strided
        or tensor.is_meta
        or tensor.is_quantized
        or tensor.nbytes > DIGEST_LIMIT
    ):
        return ""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if plain.nbytes:
        digest.update((ctypes.c_char * plain.nbytes).from_address(plain.data_ptr()))
    return digest.hexdigest()[:32]


def _identity(tensor: torch.Tensor) -> object:
    import torch

    if (
        tensor.layout != torch.strided
        or not tensor.numel()
        or not tensor.untyped_storage().data_ptr()
    ):
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device)


def _used(program: ExportedProgram) -> set[str]:
    """Return the names whose values reach an output of the graph or an operator with effects."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    live: set[object] = set()
    for node in reversed(program.graph.nodes):
        # Before decomposition a graph writes in place: such a node has an effect though no other
        # node uses it.
        if node.op == "output" or node in live or (node.op != "placeholder" and node.is_impure()):
            live.update(node.all_input_nodes)
            live.add(node)
    return {names[node.name] for node in program.graph.nodes if node in live and node.name in names}
