"""Native lanes: C++ threads that run models without the GIL, and wake the loop once per burst.

- `lane.cpp`, `run.cpp`, `batch.cpp`, `stream.cpp`: lanes and runs, without torch and Python.
- `bindings.cpp`, `py_lanes.cpp`, `tensors.cpp`: the Python module `_native`.
- `executor.py`: the executor's contract on top.

Where the installation found no compiler, `_native` is missing, and this package still imports.
"""

from __future__ import annotations

import sysconfig

if sysconfig.get_config_var("Py_GIL_DISABLED"):
    # The lanes' counters, and much else in this package, change only while the GIL is held.
    raise ImportError(
        "aoti_sched: free-threaded Python is not supported. Use a build of Python that has the GIL."
    )
