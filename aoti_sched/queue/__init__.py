"""The rules: order, admission, leases, deadlines, draining. Pure, synchronous, no clock of its own.

Facts go in with the time they happened, commands come out. Nothing here runs a model, knows torch
or asyncio, or imports more than the standard library, msgspec and `aoti_sched.errors`.
"""
