"""What can only be seen on a real device: probes of the driver, and this library's promises there.

`python -m tests.device` runs every step in a process of its own and writes `device.json`.
"""
