"""The one door through which tests reach behind a runner, to its replicas and what they are
made of.
"""

from __future__ import annotations

from types import SimpleNamespace

from aoti_sched.engine.future import future_of
from aoti_sched.queue.job import Job, Priority
from aoti_sched.runner import router_of


def replicas_of(runner):
    """Return all replicas that the runner was loaded with, a tuple."""
    return router_of(runner).replicas


def serving(runner):
    """Return the replicas that take requests, a tuple."""
    return tuple(router_of(runner).serving)


def replica_of(runner):
    """Return the replica of a runner that is on one device."""
    (replica,) = replicas_of(runner)
    return replica


def container_of(runner):
    """Return the container of a runner that is on one device."""
    return replica_of(runner).container


def updates_of(runner):
    """Return what changes the weights of the runner's scheduler."""
    return runner._updates


def tenants_of(runner):
    """Return the tenants that the runner knows."""
    return router_of(runner).tenants


def alone(replica):
    """Return what an update takes in the place of a router, of this replica only."""
    return SimpleNamespace(name=replica.name, replicas=(replica,), serving=[replica])


def submit_to(replica, *args, **kwargs):
    """Submit a request that no router sends elsewhere, and return its future."""
    inputs = replica.call_spec.flatten(args, kwargs)
    job = Job(replica.state, Priority.NORMAL, None, replica.input_check(inputs))
    future = future_of(replica, job, inputs)
    replica.dispatcher.submit(job, wait=False)
    return future
