"""Job queue: which job of one source goes next.

Jobs are ordered by priority class, then by their tenant's virtual time, then by due time.

Jobs of one class, tenant, key and length are in one bucket, in the order of their due times.
Buckets contend within a queue, by their first jobs; queues contend for lanes and for room. A change
costs O(log n), and O(1) where jobs come in the order in which they go.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from typing import Final, Generic, TypeVar

from aoti_sched.queue.heap import Heap
from aoti_sched.queue.job import Job, Priority, row_size
from aoti_sched.queue.selection.accounts import Account, FairClass
from aoti_sched.queue.selection.sorted_jobs import SortedJobs

_T = TypeVar("_T", bound=Hashable)

Rank = tuple[float, ...]
"""The order of things that contend: the least rank goes first.

A rank ends in a job's id, so no two ranks are equal.
"""

KEPT: Final = 64
"""The most buckets of a queue that are kept for later jobs before empty ones are dropped."""

NO_ACCOUNT: Final = Account()
"""The account of buckets that do not share time; never charged."""


class LazyHeap(Heap["tuple[Rank, _T]"], Generic[_T]):
    """A heap of things that contend, the thing with the least rank first.

    Entries (rank, thing) are not updated, but checked when they surface. A thing must enter again
    when its rank falls or it becomes eligible. When its rank rises, it need not. So each
    fact costs O(log n), and things without work cost nothing.

    Args:
        rank_of: A thing's rank now; None while it is not eligible.
    """

    __slots__ = ("_entered", "_rank_of")

    def __init__(self, rank_of: Callable[[_T], Rank | None]) -> None:
        super().__init__()
        self._rank_of = rank_of
        self._entered: dict[_T, Rank] = {}  # each thing's latest entry; older ones are stale

    def is_over(self, entry: tuple[Rank, _T]) -> bool:
        return self._entered.get(entry[1]) != entry[0]

    def enter(self, thing: _T) -> None:
        """Let a thing contend, whose rank may have fallen or that may have become eligible.

        To enter twice does no harm.
        """
        rank = self._rank_of(thing)
        if rank is not None:
            self.enter_as(thing, rank)

    def enter_as(self, thing: _T, rank: Rank) -> None:
        """Let an eligible thing contend, whose rank is known."""
        if self._entered.get(thing) == rank:
            return
        self.add((rank, thing))
        self._entered[thing] = rank
        self.tidy(len(self._entered))

    def leave(self, thing: _T) -> None:
        """Forget a thing that is gone for good."""
        self._entered.pop(thing, None)
        self.tidy(len(self._entered))

    def best(self) -> _T | None:
        """Return the thing that goes next; None when none is eligible."""
        while (least := self.least()) is not None:
            rank, thing = least
            current = self._rank_of(thing)
            if current == rank:
                return thing
            self.drop()
            if self._entered.get(thing) == rank:
                del self._entered[thing]
                if current is not None:
                    self.enter_as(thing, current)
        return None


class Bucket(SortedJobs):
    """Jobs of one class, tenant, key and length, the earliest due job first.

    Attributes:
        shown: The queue's buckets that contend, with or without this one: tells queues apart, and
            makes no cycle once the queue is empty.
    """

    __slots__ = ("account", "key", "length", "priority", "shown")

    def __init__(
        self, priority: int, account: Account, key: Hashable, length: int, shown: Buckets
    ) -> None:
        super().__init__()
        self.shown = shown
        self.priority = priority
        self.account = account
        self.key = key
        self.length = length

    def rank(self) -> Rank | None:
        first = self.first
        return None if first is None else (self.priority, self.account.virtual, first.due, first.id)


class Buckets:
    """Buckets that have jobs, ordered by their first jobs.

    Attributes:
        only: The bucket, when there is only one.
    """

    __slots__ = ("_contest", "_several", "only")

    def __init__(self) -> None:
        self.only: Bucket | None = None
        # Both are made for the second bucket: most often there is one.
        self._several: OrderedDict[Bucket, None] | None = None
        self._contest: LazyHeap[Bucket] | None = None

    def changed(self, bucket: Bucket) -> None:
        """Note that jobs have come to a bucket or left it."""
        only = self.only
        if bucket is only:
            if bucket.first is None:
                self.only = None
            return
        several, contest = self._several, self._contest
        if several is None or contest is None:
            if only is None:
                self.only = bucket
                return
            self.only = None
            self._several = several = OrderedDict()
            self._contest = contest = LazyHeap(Bucket.rank)
            several[only] = None
            contest.enter(only)
        if bucket.first is not None:
            several[bucket] = None
            contest.enter(bucket)
            return
        del several[bucket]
        contest.leave(bucket)
        if len(several) == 1:
            (self.only,) = several
            self._several = self._contest = None

    def first(self) -> Job | None:
        """Return the job that goes first; None when there is no bucket."""
        only, contest = self.only, self._contest
        bucket = contest.best() if only is None and contest is not None else only
        return None if bucket is None else bucket.first

    @property
    def is_empty(self) -> bool:
        """Return whether no bucket has jobs."""
        return self.only is None and self._several is None

    def all(self) -> list[Bucket]:
        """Return the buckets."""
        if self.only is not None:
            return [self.only]
        return [] if self._several is None else list(self._several)


class Keyed:
    """The jobs of one key, by their lengths: the bytes of a row, which others are padded to.

    Attributes:
        by_length: The buckets of each length that has jobs.
        lengths: These lengths, rising.
    """

    __slots__ = ("by_length", "lengths")

    def __init__(self) -> None:
        self.by_length: dict[int, Buckets] = {}
        self.lengths: list[int] = []

    def changed(self, bucket: Bucket) -> None:
        """Note that jobs have come to a bucket or left it."""
        of_length = self.by_length.get(bucket.length)
        if of_length is None:
            of_length = self.by_length[bucket.length] = Buckets()
            insort(self.lengths, bucket.length)
        of_length.changed(bucket)
        if of_length.is_empty:
            del self.by_length[bucket.length]
            self.lengths.remove(bucket.length)


class JobQueue:
    """The jobs of one source that wait for the same thing.

    Args:
        tenants: The tenants' accounts by class; without classes, no time is shared. With None,
            tenants and keys make no difference.
    """

    __slots__ = (
        "_buckets",
        "_by_key",
        "_hidden",
        "_names",
        "_plain",
        "_shown",
        "_size",
        "_tenants",
    )

    def __init__(self, tenants: tuple[FairClass, ...] | None = None) -> None:
        self._tenants = tenants
        self._shown = Buckets()
        self._plain = tuple(
            Bucket(priority, self._account_of(priority, None), None, 0, self._shown)
            for priority in Priority
        )  # buckets of jobs without tenant and key, by class
        self._buckets: dict[tuple[int, Hashable, Hashable, int], Bucket] = {}
        # The names of the buckets in `_buckets`, in the order in which they are checked.
        self._names: deque[tuple[int, Hashable, Hashable, int]] = deque()
        self._by_key: dict[Hashable, Keyed] = {}
        self._hidden: dict[Hashable, None] = {}  # in an order that a replay has, too
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, job: Job) -> None:
        bucket = self._bucket_for(job)
        job.bucket, job.node = bucket, bucket.push(job.due, job)
        self._size += 1
        self._changed(bucket)

    def remove(self, job: Job) -> None:
        bucket, node = job.bucket, job.node
        if bucket is None or node is None or bucket.shown is not self._shown:
            raise job.illegal(f"job {job.id} is not in this queue")
        bucket.remove(node)
        job.bucket = job.node = None
        self._size -= 1
        self._changed(bucket)

    def head(self) -> Job | None:
        """Return the job that goes first, of those that are not hidden; None when there is none."""
        only = self._shown.only
        return self._shown.first() if only is None else only.first

    def head_of(self, key: Hashable, length: int) -> Job | None:
        """Return the job that goes first, of those with a key and a length; None if there is none.

        A length is a `row_size`.
        """
        of_key = self._by_key.get(key)
        of_length = None if of_key is None else of_key.by_length.get(length)
        return None if of_length is None else of_length.first()

    def lengths_near(self, key: Hashable, length: int) -> tuple[list[int], list[int]]:
        """Return the lengths of a key's jobs, the nearest to `length` first.

        Returns:
            Those up to `length`, and those above.
        """
        of_key = self._by_key.get(key)
        if of_key is None:
            return [], []
        lengths = of_key.lengths
        place = bisect_left(lengths, length + 1)
        return lengths[:place][::-1], lengths[place:]

    def hide(self, key: Hashable) -> None:
        """Hide the jobs of a key that come from now on. The key must have no jobs yet."""
        self._hidden[key] = None

    def show(self, key: Hashable) -> None:
        """Let the jobs of a hidden key contend."""
        self._hidden.pop(key, None)
        of_key = self._by_key.get(key)
        for of_length in () if of_key is None else of_key.by_length.values():
            for bucket in of_length.all():
                self._shown.changed(bucket)

    def each(self) -> Iterator[Job]:
        """Yield all jobs, in no guaranteed order, and without building a list."""
        for bucket in self._shown.all():
            yield from bucket.each()
        for key in self._hidden:
            for of_length in self._by_key[key].by_length.values():  # a hidden key has jobs
                for bucket in of_length.all():
                    yield from bucket.each()

    def jobs(self) -> list[Job]:
        """Return all jobs, ordered by class, due time and arrival."""
        return sorted(
            [job for bucket in (*self._plain, *self._buckets.values()) for job in bucket.jobs()],
            key=lambda job: (job.priority, job.due, job.id),
        )

    def _bucket_for(self, job: Job) -> Bucket:
        """Return the bucket of a job that is about to be in the queue."""
        if self._tenants is None or (job.tenant is None and job.key is None):
            return self._plain[job.priority]
        length = 0 if job.key is None else row_size(job)
        name = (job.priority, job.tenant, job.key, length)
        bucket = self._buckets.get(name)
        if bucket is None:
            self._drop_buckets()
            bucket = self._buckets[name] = Bucket(
                job.priority, NO_ACCOUNT, job.key, length, self._shown
            )
            self._names.append(name)
        if bucket.first is None:
            bucket.account = self._account_of(job.priority, job.tenant)
        return bucket

    def _account_of(self, priority: int, tenant: Hashable) -> Account:
        tenants = self._tenants
        return tenants[priority].of(tenant) if tenants else NO_ACCOUNT

    def _drop_buckets(self) -> None:
        """Check two buckets for a new one, and drop those without jobs.

        The buckets are checked in a circle, so that no fact has to check all.
        """
        names = self._names
        for _ in range(2 if len(names) >= KEPT else 0):
            name = names.popleft()
            if self._buckets[name].first is None:
                del self._buckets[name]
            else:
                names.append(name)

    def _changed(self, bucket: Bucket) -> None:
        key = bucket.key
        if key is not None:
            of_key = self._by_key.get(key)
            if of_key is None:
                of_key = self._by_key[key] = Keyed()
            of_key.changed(bucket)
            if not of_key.lengths:
                del self._by_key[key]
            if key in self._hidden:
                return
        self._shown.changed(bucket)
