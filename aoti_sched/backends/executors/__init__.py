"""Executors: lanes of Python threads, the choice of native lanes, inline runs, and batches."""
