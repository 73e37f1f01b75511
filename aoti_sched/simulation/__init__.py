"""Simulation: a real scheduler in virtual time, on runs whose times are known.

The queue, the engine and the face are the ones that serve. Only two things differ: the event loop
jumps to the next timer instead of sleeping (`virtual_loop`), and a run takes the time that was
measured for it (`device`, `service_times`). Nothing here imports torch.

- `recorded` reads a recording that `Recording.save` has written.
- `replay` sends requests through a scheduler, and returns what became of them.
- `outcome` has the figures of a recording or of a simulation.

What takes no time here: the event loop's own work, hops between threads, and the copies of batches.
Runs on neighbouring cores do not slow each other down.
"""
