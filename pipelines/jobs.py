"""Jobs that several processes divide among themselves: each is done once, by one of them."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from utils.claims import Claim, Claims
from utils.sharding import agreed

PAUSE = 2.0  # seconds before the jobs that others hold are looked at again


class Job(NamedTuple):
    """Something to be done once; what `done` asks for must outlive the process."""

    name: str
    done: Callable[[], bool]
    run: Callable[[Callable[[], bool]], None]  # is given whether the claim is still held


def work_off(claims: Claims, jobs: Sequence[Job]) -> None:
    """Returns when all jobs are done, by this program or by others that share the claims' folder.

    The processes of one program (`jax.distributed`) call it alike; the first one holds the claims,
    and asks whether a job is done.
    """
    told = ""
    while jobs:
        jobs = [job for job in jobs if not _finished(claims, job)]
        if jobs:
            told = _tell(claims, jobs, told)
            time.sleep(PAUSE)


def _finished(claims: Claims, job: Job) -> bool:
    """Whether the job is done, after doing it where nobody alive does."""
    if _done(job):
        return True
    first = jax.process_index() == 0
    with claims.take(job.name) if first else contextlib.nullcontext() as claim:
        if not agreed(claim is not None):
            return False
        if not _done(job):  # by whoever held the claim before
            job.run(claim.held if isinstance(claim, Claim) else lambda: True)
    return _done(job)


def _done(job: Job) -> bool:
    return bool(agreed(jax.process_index() == 0 and job.done()))


def _tell(claims: Claims, jobs: Sequence[Job], told: str) -> str:
    """Says, where it is news, who holds what is waited for."""
    holders = {claims.holder(job.name) for job in jobs} - {""}
    words = f"waiting for {len(jobs)} of {', '.join(sorted(holders))}" if holders else ""
    if words and words != told and jax.process_index() == 0:
        print(words, file=sys.stderr)
    return words
