"""Shares: which of several runners a request of a split goes to.

Requests without a key are dealt in proportion to the shares: after any number of requests, each
runner has had its part of them to within one request for each other runner. The rule is smooth
weighted round robin, as nginx has it (`ngx_http_upstream_round_robin.c`).

Requests with a key go where the key belongs, by weighted rendezvous hashing (Thaler and Ravishankar
1998; weights by Schindelhauer and Schomaker 2005). Each key has a number for each runner, which
depends on their names alone. So equal keys go to one runner, in each process and after each
restart, and a change of the shares moves no more keys than it must.
"""

from __future__ import annotations

import hashlib
import math


class Shares:
    """Deals requests to runners, in proportion to their shares.

    Args:
        shares: The share of each runner, by name; positive, or 0 for none. Only their proportions
            count.
    """

    __slots__ = ("_credit", "_shares", "_total")

    def __init__(self, shares: dict[str, float]) -> None:
        self._shares = {name: share for name, share in shares.items() if share > 0.0}
        self._total = math.fsum(self._shares.values())
        self._credit = dict.fromkeys(self._shares, 0.0)

    def next(self) -> str:
        """Return the runner of the next request without a key."""
        credit, chosen = self._credit, ""
        for name, share in self._shares.items():
            credit[name] += share
            if not chosen or credit[name] > credit[chosen]:
                chosen = name
        credit[chosen] -= self._total
        return chosen

    def of(self, key: str) -> str:
        """Return the runner of all requests with this key."""
        return min(self._shares, key=lambda name: _distance(key, name) / self._shares[name])


def _distance(key: str, name: str) -> float:
    """Return a number drawn from the exponential distribution, the same for the same names."""
    # The length keeps the two names apart: "a" and "bc" are not "ab" and "c".
    text = f"{len(name)}:{name}{key}".encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return -math.log((number + 0.5) / 2.0**64)
