"""The machinery: it loads, runs, updates and swaps compiled models, and decides nothing.

Nothing here knows an event loop or imports `queue/`. torch may be imported at the top of these
files, since nothing that `import aoti_sched` reaches imports them.

`contracts.py` has the contracts. From the C ABI upwards: `aoti/c_abi.py` describes the functions,
`aoti/handles.py` carries tensors across, `aoti/constants.py` checks what would be written, and
`aoti/raw_container.py` (runs), `aoti/raw_constants.py` (weights) and `aoti/bare_model.py` are safe
to call.
"""
