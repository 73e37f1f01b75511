"""Wrapper source: finds writes to buffers and inputs in a package's generated `*.wrapper.cpp`.

The source is searched as text. Code that is not understood counts as unknown, never as harmless.
`specs.py` reads the shapes of inputs from the same source.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from aoti_sched.model.specs import ConstantSpec, ModelSpec


class Writes(msgspec.Struct, frozen=True):
    """Whether a run writes to constants and inputs; None where the source does not show that.

    Attributes:
        constants: An entry for each constant by FQN.
        buffers: The FQNs of the constants that are buffers of the module.
        inputs: An entry for each input, in order.
    """

    constants: dict[str, bool | None]
    buffers: frozenset[str]
    inputs: tuple[bool | None, ...]


def writes_in(source: str) -> Writes | None:
    """Return the writes in a wrapper source; None where the source's body is not understood."""
    body = _body(source)
    if body is None:
        return None
    parameters = _triton_parameters(source)
    names = {int(index): name for name, index in _BOUND.findall(body)}
    fqns = {int(index): fqn for index, fqn in _FQN.findall(source)}
    constants = {
        fqn: _is_written(body, names[index], parameters) if index in names else False
        for index, fqn in fqns.items()
    }
    buffers = frozenset(fqns[int(index)] for index in _BUFFER.findall(source) if int(index) in fqns)
    inputs = {int(index): name for name, index in _INPUT.findall(body)}
    found = tuple(
        _is_written(body, inputs[i], parameters) if i in inputs else None
        for i in range(max(inputs, default=-1) + 1)
    )
    return Writes(constants, buffers, found)


WRITES = "it writes to its buffers"
MAY_WRITE = "it has buffers, and its package does not say whether it writes to them"


def writes_to_buffers(
    own: ModelSpec | None, wrapper: str | None, constants: Sequence[ConstantSpec] = ()
) -> str:
    """Return why a model counts as writing to its buffers; "" where it does not.

    A model with buffers counts as writing to them unless its package shows otherwise.

    Args:
        own: The spec that `compile_package` stored in the package.
        wrapper: The model's wrapper source.
        constants: The constants of the loaded container. Without the other two, only these show
            whether there are buffers.

    Returns:
        `WRITES`, `MAY_WRITE` or "".
    """
    if own is not None:
        return WRITES if own.mutates_buffers else ""
    shown = writes_in(wrapper) if wrapper is not None else None
    if shown is None:
        return MAY_WRITE if any(constant.type == "buffer" for constant in constants) else ""
    if any(shown.constants.values()):  # a parameter that is written to is state like any other
        return WRITES
    unknown = any(shown.constants.get(fqn) is None for fqn in shown.buffers)
    return MAY_WRITE if unknown else ""


# --- reading --------------------------------------------------------------------------------------

_BODY = re.compile(
    r"^\s*void AOTInductorModel::run_impl\((.*?)^\} // AOTInductorModel::run_impl",
    re.DOTALL | re.MULTILINE,
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_BOUND = re.compile(r"auto& (\w+) = constants_->at\((\d+)\);")
_INPUT = re.compile(r"auto (\w+) = std::move\(inputs\[(\d+)\]\);")
_FQN = re.compile(r'constants_info_\[(\d+)\]\.original_fqn = "([^"\n]*)";')
_BUFFER = re.compile(
    r"constants_info_\[(\d+)\]\.type = "
    r"static_cast<int32_t>\(torch::aot_inductor::ConstantType::Buffer\);"
)
_READS = (
    r"auto& {0} = constants_->at\(\d+\);",
    r"auto {0} = std::move\(inputs\[\d+\]\);",
    r"\(const [\w:]+\*\)\({0}\.data_ptr\(\)\)",
    r"\b{0}\.(?:sizes|strides|reset)\(\)",
    r"assert_size_stride\({0},[^;]*;",
    r"\bcodegen_[\w<>]*\({0}\)",
)
_CAST = r"\((?!const )[\w:]+\*\)\({0}\.data_ptr\(\)\)"
_DECLARED = re.compile(r"static inline void (call_\w+)\(([^)]*)\)", re.DOTALL)
_STATEMENT = re.compile(r"[^;]*;", re.DOTALL)
_CALL = re.compile(r"\b(?:aoti_torch|call)_\w+(?=\()")
_SHIM = re.compile(r"aoti_torch_(?:(?:cpu|cuda|xpu|mps)_)?(\w+)")
_ALIAS = re.compile(r"\b(\w+)(?:\[\])?\s*=[^=]|\b\w*Handle\w* (\w+)\(")


def _body(source: str) -> str | None:
    found = _BODY.search(source)
    return None if found is None else _COMMENT.sub("", found[1])


def _triton_parameters(source: str) -> dict[str, list[str]]:
    """Return parameter names of the functions that launch kernels, such as in_ptr0 and out_ptr0."""
    found = {}
    for name, parameters in _DECLARED.findall(source):
        found[name] = [
            part.split()[-1].lstrip("&*") for part in parameters.split(",") if part.split()
        ]
    return found


def _is_written(
    body: str, name: str, parameters: dict[str, list[str]], seen: frozenset[str] = frozenset()
) -> bool | None:
    """Return whether the code writes to the tensor of this name, or to an alias of the tensor."""
    word = re.escape(name)
    if re.search(_CAST.format(word), body):
        return True
    rest = body
    for pattern in _READS:
        rest = re.sub(pattern.format(word), "", rest)
    mention = re.compile(rf"\b{word}\b")
    unknown = False
    for statement in _STATEMENT.findall(rest):
        if not mention.search(statement):
            continue
        found = _use(statement, mention, parameters)
        if found is None:  # the uses of an alias may show it
            alias = _ALIAS.search(statement)
            other = (alias[1] or alias[2]) if alias is not None else None
            if other is not None and other not in {name, *seen} and other != "output_handles":
                found = _is_written(body.replace(statement, ""), other, parameters, seen | {name})
            elif other == "output_handles":
                found = False
        if found:
            return True
        unknown = unknown or found is None
    return None if unknown else False


def _use(statement: str, mention: re.Pattern[str], parameters: dict[str, list[str]]) -> bool | None:
    """Return whether the call in a statement writes to the tensor among its arguments."""
    call = _CALL.search(statement)
    if call is None:
        return None
    arguments = _arguments(statement[call.end() :])
    places = [index for index, argument in enumerate(arguments) if mention.search(argument)]
    if not places:
        return None
    function = call[0]
    if function in parameters:
        names = [parameters[function][place : place + 1] or ["?"] for place in places]
        kinds = [name[0] for name in names]
        if any(kind.startswith(("out_ptr", "in_out_ptr")) for kind in kinds):
            return True
        return False if all(kind.startswith("in_ptr") for kind in kinds) else None
    shim = _SHIM.fullmatch(function)
    if shim is None or shim[1] in _OPAQUE or "moving_avg" in shim[1]:
        return None
    # By torch's naming, functions like add_, fill__Scalar and mm_out write to their first argument.
    # All others write to no argument.
    in_place = (
        shim[1].endswith("_") or "__" in shim[1].lstrip("_") or re.search(r"_out(_|$)", shim[1])
    )
    return bool(in_place) and 0 in places


_OPAQUE = {"proxy_executor_call_function", "call_dispatcher", "get_data_ptr", "get_storage_size"}


def _arguments(text: str) -> list[str]:
    """Return the arguments of a call whose opening bracket is the first character."""
    arguments: list[str] = []
    depth, start = 0, 1
    for place, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0:
                return [*arguments, text[start:place]]
        elif character == "," and depth == 1:
            arguments.append(text[start:place])
            start = place + 1
    return [*arguments, text[start:]]
