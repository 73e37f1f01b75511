"""Semantic search with a digit classifier beside it: two compiled models under one `Scheduler`.

Run it from the repository root with `python -m examples.semantic_search`. The reading order is
`__main__.py` (the program, from start to end), `minilm.py` and `digits.py` (the two models, plain
PyTorch), `packages.py` (compiling them once), `serving.py` (what the clients do; the part an
application would resemble) and `report.py` (the tables and the picture).
"""
