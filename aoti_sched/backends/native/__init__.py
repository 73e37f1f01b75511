"""Native lanes: C++ threads that run models without the GIL, and tell the loop once per burst.

`lane.cpp` and `running.cpp` are the machinery and know neither torch nor Python, `module.cpp` is its Python face (`_native`), and
`executor.py` the executor's contract on top. Where no compiler was at hand at install, `_native` is missing, and this
package still imports.
"""
