"""Benchmarks: side by side in one run, printed as ratios. See README.md beside this file."""
