"""Reliable timing: interleaved candidates, ratios within a round, idle threads asleep.

Clocks drift by ten percent within a minute, so the milliseconds of two libraries are only comparable if measured
seconds apart. Each round therefore times every candidate once, every second round in reverse (A B C, C B A), and only
times of the same round are compared; `ratio` is the median over the rounds.
"""

import math
import statistics
import time
from dataclasses import dataclass

# Shorter calls are repeated in a sample, so that clock resolution and single interrupts do not matter.
SAMPLE_SECONDS = 0.02
# A call longer than this needs no warm-up to fill the caches and wake the threads. Shorter ones get as many warm-up
# calls as are in a sample: data larger than a cache takes several passes until the cache holds as much of it as it ever
# will.
LONG_SECONDS = 0.1


@dataclass
class Candidate:
    """Something to time. One call counts as `units` calls, for probes that repeat internally."""

    name: str
    call: object
    units: float = 1.0
    number: int = 0  # calls in a sample
    estimate: float = 0.0  # seconds of one call, measured before the first round


def wait_until_idle(limit=1.0):
    """Sleeps until no thread of this process runs.

    OpenBLAS spins for 26 ms after a call and ONNX Runtime for 90: whatever is timed meanwhile shares the cores.
    """
    deadline = time.perf_counter() + limit
    while time.perf_counter() < deadline:
        used, start = time.process_time(), time.perf_counter()
        time.sleep(0.004)
        if time.process_time() - used < 0.1 * (time.perf_counter() - start):
            return


def seconds(call, number):
    """Seconds per call, the mean of `number` calls."""
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def calibrate(call):
    """How many calls make a sample, and roughly how many seconds one takes."""
    call()
    number, each = 1, seconds(call, 1)
    while number * each < SAMPLE_SECONDS:
        wanted = math.ceil(1.1 * SAMPLE_SECONDS / max(each, 1e-9))
        number = max(number + 1, min(10 * number, wanted))
        each = seconds(call, number)
    return number, each


def interleave(candidates, rounds, progress=None):
    """Seconds per unit of each candidate in each round: {name: [seconds, ...]}."""
    samples = {candidate.name: [] for candidate in candidates}
    for candidate in candidates:
        wait_until_idle()
        candidate.number, candidate.estimate = calibrate(candidate.call)
    for turn in range(rounds):
        for candidate in candidates if turn % 2 == 0 else reversed(candidates):
            wait_until_idle()
            if candidate.estimate < LONG_SECONDS:
                seconds(candidate.call, candidate.number)
            samples[candidate.name].append(seconds(candidate.call, candidate.number) / candidate.units)
        if progress:
            progress()
    return samples


def ratio(samples, numerator, denominator):
    """Median over the rounds, or None if either was not measured."""
    if numerator not in samples or denominator not in samples:
        return None
    pairs = zip(samples[numerator], samples[denominator], strict=True)
    return statistics.median(above / below for above, below in pairs)


def median(samples, name):
    return statistics.median(samples[name]) if name in samples else None
