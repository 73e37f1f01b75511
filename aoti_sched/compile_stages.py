"""The stages of compiling, and the moment at which torch hands C++ to the compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

Stage = Literal["exporting", "examining", "lowering", "compiling", "verifying", "packaging"]
"""What `compile_package` does, in this order.

- "exporting": torch.export traces the module.
- "examining": the module and its program run on other inputs, to find sizes and independent rows.
- "lowering": inductor turns the program into C++.
- "compiling": the C++ compiler compiles it.
- "verifying": the compiled code runs on small sizes.
- "packaging": the package is written.
"""

Progress = Callable[[Stage], None]
"""Called at the beginning of each stage, on the thread that compiles."""


@contextmanager
def telling_compilation(progress: Progress | None) -> Iterator[None]:
    """Call `progress` when inductor hands the C++ that it made to the compiler, within the block.

    torch has no hook there, so its function is wrapped for the duration of the block. A torch
    without that function never tells "compiling".
    """
    from torch._inductor import codecache

    compiler = getattr(codecache, "AotCodeCompiler", None)
    if progress is None or compiler is None or "compile" not in vars(compiler):
        yield
        return
    own = vars(compiler)["compile"]
    inner = compiler.compile

    @functools.wraps(inner)
    def compile_code(*args: Any, **kwargs: Any) -> Any:
        progress("compiling")
        return inner(*args, **kwargs)

    compiler.compile = staticmethod(compile_code)
    try:
        yield
    finally:
        compiler.compile = own
