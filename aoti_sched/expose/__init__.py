"""Expose: a scheduler's numbers to other processes of the same user, over HTTP.

`Scheduler.expose` opens a Unix socket, and a loopback port when asked. The commands `stats`, `top`,
`timeline` and `weights` and the live page are its clients.

- `sockets` finds and makes the sockets; it knows neither asyncio nor HTTP.
- `reports` has the answers, as msgspec Structs with a version.
- `routes` reads, `writing` changes weights, and `guard` keeps other web pages out.
- `server` serves on the scheduler's event loop.
- `page/` is the live page, and uPlot, which draws its charts.

Nothing here decides anything about requests. The server needs the extra `expose`.
"""
