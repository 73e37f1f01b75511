"""How runs are placed on threads: lanes of Python threads, the choice of native ones, inline
runs, batches.
"""
