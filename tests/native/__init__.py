"""The native lanes, driven by a small C library in the place of compiled models, so that every
failure can be had.
"""
