"""Devices with streams: CUDA, XPU and MPS, and CUDA graphs."""
