"""Model: what a model takes and returns, as specs, call spec, input check and batch layout.

Nothing here imports torch at import.
"""
