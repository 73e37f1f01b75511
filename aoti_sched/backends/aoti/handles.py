"""Tensors across the C ABI: Python's tensors to `AtenTensorHandle`s and back, and their owners.

A handle owns a reference to its tensor until the handle is freed or stolen. The way through
capsules is torch's own; the runs' hot path goes through here, so it stays short.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from ctypes import POINTER, c_char_p, c_int32, c_void_p, py_object
from typing import Any

import torch

# Not the ones for a single tensor: torch 2.13's `alloc_tensor_by_stealing_from_void_ptr` leaks the
# handle.
from torch._C._aoti import alloc_tensors_by_stealing_from_void_ptrs as _steal
from torch._C._aoti import unsafe_alloc_void_ptrs_from_tensors as _handles

from aoti_sched.backends.aoti.c_abi import libtorch
from aoti_sched.errors import LoadError

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.argtypes = (py_object, c_char_p)
_pointer_of.restype = c_void_p
_capsule_of = ctypes.pythonapi.PyCapsule_New
_capsule_of.argtypes = (c_void_p, c_char_p, c_void_p)
_capsule_of.restype = py_object

_delete = libtorch.aoti_torch_delete_tensor_object
_delete.argtypes = (c_void_p,)
_delete.restype = c_int32
_new_handle = libtorch.aoti_torch_new_tensor_handle
_new_handle.argtypes = (c_void_p, POINTER(c_void_p))
_new_handle.restype = c_int32


def address_of(name: str) -> int:
    """Return the address of one of torch's functions; 0 where this torch has none of that name."""
    function = getattr(libtorch, name, None)
    return 0 if function is None else ctypes.cast(function, c_void_p).value or 0


def capsule_of(pointer: int) -> Any:
    """Return a pointer as torch's bindings take it (`void*`): in a capsule without a name."""
    return _capsule_of(pointer, None, None)


def handles_of(tensors: list[torch.Tensor]) -> list[int]:
    """Return a new handle for each tensor; each must be given away to C or freed."""
    # All at once: were one no tensor, the handles before it would be lost.
    return [_pointer_of(capsule, None) for capsule in _handles(tensors)]


def tensors_of(handles: Iterable[int | None]) -> list[torch.Tensor | None]:
    """Return the tensors of handles that the caller owns. The handles are freed.

    A null handle, for an output that is left out, becomes None. Equal handles become the same
    tensor, and are freed once.
    """
    slots = list(handles)
    if None in slots:
        present = iter(tensors_of([handle for handle in slots if handle is not None]))
        return [None if handle is None else next(present) for handle in slots]
    return list(_steal([_capsule_of(handle, None, None) for handle in slots]))


def free(handles: Iterable[int | None]) -> None:
    """Free handles that the caller owns. Null handles are skipped, equal ones are freed once."""
    for handle in {*handles}:
        if handle is not None:
            _delete(handle)


def each_once(
    outputs: Sequence[torch.Tensor | None], made: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor | None]:
    """Return `made(output)` for each output; None stays None.

    Each tensor is made once, so that equal outputs stay one tensor.
    """
    known: dict[int, torch.Tensor | None] = {}
    for tensor in outputs:
        if id(tensor) not in known:
            known[id(tensor)] = None if tensor is None else made(tensor)
    return [known[id(tensor)] for tensor in outputs]


def borrowed(handle: int) -> torch.Tensor:
    """Return a tensor on the memory of a handle that the caller does not own."""
    own = c_void_p()
    if _new_handle(handle, ctypes.byref(own)) != 0:
        raise LoadError("torch could not take a reference to a model's constant")
    (tensor,) = _steal([_capsule_of(own, None, None)])
    return tensor


def _dtype_codes() -> dict[int, torch.dtype]:
    # Asked of torch rather than written down: the codes are c10::ScalarType's, and torch adds to
    # them.
    codes = {}
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        code_of = getattr(libtorch, f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}", None)
        if code_of is not None:
            code_of.argtypes = ()
            code_of.restype = c_int32
            codes[code_of()] = dtype
    return codes


DTYPES = _dtype_codes()
"""The dtypes that compiled models know, by the number the C ABI has for each."""
