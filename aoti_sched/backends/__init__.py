"""The machinery: it loads, runs, updates and swaps compiled models, and decides nothing.

Nothing here knows an event loop or imports `queue/`. torch may be imported at the top of these files, since
nothing that `import aoti_sched` reaches imports them.

`base.py` has the contracts. From the C ABI upwards: `c_abi.py` describes the functions, `handles.py`
carries tensors across, `constants.py` checks what would be written, and `raw_container.py` and
`bare_model.py` are safe to call.
"""
