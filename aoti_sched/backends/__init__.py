"""Backends: load, run and update compiled models, and contain no scheduling policy.

Nothing here knows an event loop or imports `queue/`. torch may be imported at the top of these
files, since nothing that `import aoti_sched` reaches imports them.

`contracts.py` has the contracts. The layers above the C ABI are:

- `aoti/c_abi.py` describes the functions of the C ABI.
- `aoti/handles.py` turns tensors into handles and back.
- `aoti/weight_check.py` checks new weights before they are written.
- `aoti/raw_container.py` (runs), `aoti/raw_constants.py` (weights) and `aoti/bare_model.py` call
  the C ABI and check everything that could crash the process.
"""
