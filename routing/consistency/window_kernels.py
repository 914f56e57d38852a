"""Compiled counts over windows, runs and neighbours of one router's decisions, linear in decisions.

Every kernel walks sequences one by one and reads token `order[i]` at place i, so that a shuffled trace is another `order`.
The id `n_experts` stands for a slot to ignore.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def mark_repeats(experts, ignored):  # type: ignore[no-untyped-def]  # numba infers them
    """[token, k] ids with every second naming of an expert by the same token set to `ignored`; and how many there were."""
    marked = experts.copy()
    repeats = 0
    for token in range(len(experts)):
        for slot in range(1, experts.shape[1]):
            for earlier in range(slot):
                if experts[token, earlier] == experts[token, slot]:
                    marked[token, slot] = ignored
                    repeats += 1
                    break
    return marked, repeats


@njit(cache=True, nogil=True)
def window_histogram(experts, order, begins, lengths, rows, n_rows, columns, n_columns, segment):  # type: ignore[no-untyped-def]  # numba infers them
    """[row, column, count] windows of `segment` tokens in which an expert is chosen `count` times.

    Args:
        experts: [token, k] ids; order: [token]; begins, lengths: [sequence] of at least `segment` tokens each.
        rows: [sequence] row it counts for, −1 for none; columns: [expert + 1] column, −1 for none.
    """
    histogram = np.zeros((n_rows, n_columns, segment + 1), np.int64)
    counts = np.zeros(len(columns), np.int64)
    since = np.zeros(len(columns), np.int64)
    for sequence in range(len(begins)):
        if rows[sequence] < 0:
            continue
        here = histogram[rows[sequence]]
        begin, moves = begins[sequence], lengths[sequence] - segment
        counts[:] = 0
        since[:] = 0
        for token in range(begin, begin + segment):
            for slot in range(experts.shape[1]):
                counts[experts[order[token], slot]] += 1
        for move in range(1, moves + 1):
            leaving, entering = order[begin + move - 1], order[begin + move + segment - 1]
            for slot in range(experts.shape[1]):
                expert = experts[leaving, slot]
                if columns[expert] >= 0:
                    here[columns[expert], counts[expert]] += move - since[expert]
                    since[expert] = move
                    counts[expert] -= 1
            for slot in range(experts.shape[1]):
                expert = experts[entering, slot]
                if columns[expert] >= 0:
                    here[columns[expert], counts[expert]] += move - since[expert]
                    since[expert] = move
                    counts[expert] += 1
        for expert in range(len(columns)):
            if columns[expert] >= 0:
                here[columns[expert], counts[expert]] += moves + 1 - since[expert]
    return histogram


@njit(cache=True, nogil=True)
def shared_histogram(experts, order, begins, lengths, rows, n_rows, n_experts, lag):  # type: ignore[no-untyped-def]  # numba infers them
    """[row, shared] pairs of tokens `lag` apart that share so many experts; and [row] pairs with the same first choice.

    Args:
        rows: [token] row that the pair ending at this place counts for, −1 for none.
    """
    shared = np.zeros((n_rows, experts.shape[1] + 1), np.int64)
    same_first = np.zeros(n_rows, np.int64)
    stamp = np.full(n_experts + 1, -1, np.int64)
    for sequence in range(len(begins)):
        for place in range(begins[sequence] + lag, begins[sequence] + lengths[sequence]):
            if rows[place] < 0:
                continue
            earlier, later = experts[order[place - lag]], experts[order[place]]
            for expert in earlier:
                stamp[expert] = place
            both = 0
            for expert in later:
                if expert < n_experts and stamp[expert] == place:
                    both += 1
            shared[rows[place], both] += 1
            same_first[rows[place]] += earlier[0] == later[0]
    return shared, same_first


@njit(cache=True, nogil=True)
def runs_and_gaps(experts, order, begins, lengths, rows, n_rows, n_experts, least, widths):  # type: ignore[no-untyped-def]  # numba infers them
    """How long experts stay, and in how many windows they are missing.

    Args:
        rows: [sequence] row it counts for, −1 for none.
        least: [length] ascending; widths: [width] of windows.

    Returns:
        [row, length] runs of an expert over consecutive tokens that last at least `least`; [row, width] pairs of a window of
        `widths` tokens and an expert that no token of it chooses; [row, width] choices of an expert that none of the
        `widths` tokens before chose, where there are so many.
    """
    runs = np.zeros((n_rows, len(least)), np.int64)
    missing = np.zeros((n_rows, len(widths)), np.int64)
    fresh = np.zeros((n_rows, len(widths)), np.int64)
    longest = 0
    for length in lengths:
        longest = max(longest, length)
    # How often a run, a gap that a choice ends and a gap that the sequence ends last so long.
    stays = np.zeros(longest + 1, np.int64)
    gaps = np.zeros(longest + 1, np.int64)
    tails = np.zeros(longest + 1, np.int64)
    begun = np.zeros(n_experts, np.int64)
    last = np.zeros(n_experts, np.int64)
    for sequence in range(len(begins)):
        row, begin, length = rows[sequence], begins[sequence], lengths[sequence]
        if row < 0:
            continue
        begun[:] = -1
        last[:] = begin - 1
        for place in range(begin, begin + length):
            for slot in range(experts.shape[1]):
                expert = experts[order[place], slot]
                if expert == n_experts:
                    continue
                gap = place - last[expert] - 1
                if gap > 0 or begun[expert] < 0:
                    gaps[gap] += 1
                    if begun[expert] >= 0:
                        stays[last[expert] - begun[expert] + 1] += 1
                    begun[expert] = place
                last[expert] = place
        for expert in range(n_experts):
            tails[begin + length - last[expert] - 1] += 1
            if begun[expert] >= 0:
                stays[last[expert] - begun[expert] + 1] += 1
        _sum_at_least(stays, length, least, runs[row])
        _sum_at_least(gaps, length, widths, fresh[row])
        _sum_places(gaps, tails, length, widths, missing[row])
        stays[: length + 1] = 0
        gaps[: length + 1] = 0
        tails[: length + 1] = 0
    return runs, missing, fresh


@njit(cache=True, nogil=True)
def _sum_at_least(counts, longest, limits, total):  # type: ignore[no-untyped-def]  # numba infers them
    """Add to `total` how many of `counts` by size reach each of the ascending `limits`."""
    size, reached = longest, 0
    for i in range(len(limits) - 1, -1, -1):
        while size >= limits[i]:
            reached += counts[size]
            size -= 1
        total[i] += reached


@njit(cache=True, nogil=True)
def _sum_places(gaps, tails, longest, widths, total):  # type: ignore[no-untyped-def]  # numba infers them
    """Add to `total` how many places the gaps by size have for each of the ascending `widths`."""
    size, places, reached = longest, 0, 0
    for i in range(len(widths) - 1, -1, -1):
        while size >= widths[i]:
            # Every gap that reached the size before has one place more for this one.
            reached += gaps[size] + tails[size]
            places += reached
            size -= 1
        total[i] += places


@njit(cache=True, nogil=True)
def best_f1(histograms):  # type: ignore[no-untyped-def]  # numba infers them
    """[row] largest F1 over thresholds from [row, m + 1] pairs by how often the window chooses the expert."""
    segment = histograms.shape[1] - 1
    best = np.zeros(len(histograms))
    for row in range(len(histograms)):
        chosen = 0.0
        for count in range(segment + 1):
            chosen += count * np.float64(histograms[row, count])
        if chosen == 0.0:
            continue
        at_least, hits = 0.0, 0.0
        for count in range(segment, -1, -1):
            at_least += np.float64(histograms[row, count])
            hits += count * np.float64(histograms[row, count])
            best[row] = max(best[row], 2 * hits / (segment * at_least + chosen))
    return best
