"""Time and memory for the speed scripts. Calls take turns, so that a slow moment meets them all.

    times = timing.interleaved(run, {"ours": ours, "peer": peer}, rounds=11)
    timing.ratio(times, "peer", "ours")         # above 1: ours is faster

A figure is a median over rounds; a comparison is the median of the ratios within a round.
"""

import random
import statistics
import time
from collections.abc import Callable

import torch


def stopwatch(device: torch.device) -> Callable[[], float]:
    """Seconds: CPU time of the process where one thread does all the work, else wall time, after
    the GPU has finished."""
    if device.type == "cuda":
        def wall():
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return wall
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def interleaved(run, functions: dict[str, Callable], rounds: int, label: str = "timing", *,
                at_least: float = 0.0,
                clock: Callable[[], float] | None = None) -> dict[str, list[float]]:
    """Seconds of a call of each function in each round; a first round warms up and is left out.

    The order changes from round to round, as memory left warm by one function helps the next.
    Functions that take less than `at_least` seconds are called that much longer, and averaged.
    """
    clock = clock or stopwatch(run.device)
    times, calls = {name: [] for name in functions}, {}
    for number in run.progress(range(rounds + 1), label=label):
        for name in random.Random(number).sample(list(functions), len(functions)):
            began = clock()
            for _ in range(calls.get(name, 1)):
                functions[name]()
            times[name].append((clock() - began) / calls.get(name, 1))
            calls.setdefault(name, max(1, int(at_least / max(times[name][0], 1e-9))))
    return {name: values[1:] for name, values in times.items()}


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(times: dict[str, list[float]], name: str, other: str) -> float:
    """Median over the rounds of time `name` / time `other`."""
    return statistics.median(a / b for a, b in zip(times[name], times[other]))


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Peak of the bytes that torch allocates during a call, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
