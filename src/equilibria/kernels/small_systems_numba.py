"""The small systems of Anderson's and Broyden's steps, sample by sample, compiled for the CPU.

In one file, because what is compiled is kept until the file that it stands in changes, whatever
happens to the files that it calls.
"""

from __future__ import annotations

import math

import numpy as np

from equilibria.kernels.compiler import Array, compiled

SMALLEST_SQUARE = float(np.finfo(np.float64).tiny) ** (2.0 / 3.0)
ROUNDING = 10.0 * float(np.finfo(np.float64).eps)
"""As in `equilibria.solvers.anderson`, for small matrices in double."""


LANES = 8
"""Samples that Anderson's systems are solved for at a time, one to each lane of a vector unit."""


@compiled
def anderson_weights(
    products: Array,
    squares: Array,
    gram: Array,
    slot: int,
    first: bool,
    ridge: float,
    min_angle: float,
) -> Array:
    """Update the small matrices and solve for -gamma (B, n), the weights of image differences."""
    batch, _, n = products.shape
    weights = np.empty((batch, n))
    order = np.empty(n, np.int64)  # newest first
    for i in range(n):
        order[i] = (slot - i) % n
    unit, factor = np.empty((n, n, LANES)), np.empty((n, n, LANES))
    lower, right, scale = np.empty((n, n, LANES)), np.empty((n, LANES)), np.empty((n, LANES))
    system, alone = np.empty((n, n)), np.empty(n)
    for begin in range(0, batch, LANES):
        lanes = min(LANES, batch - begin)
        for lane in range(lanes):
            b = begin + lane
            _update(products[b], squares[b], gram[b], slot, first)
        for lane in range(LANES):
            b = begin + min(lane, lanes - 1)  # lanes left over do the last sample again
            lengths = squares[b] if first else gram[b]
            for i in range(n):
                for j in range(n):
                    factor[i, j, lane] = lengths[i, j]
                    unit[i, j, lane] = gram[b, i, j]
                right[i, lane] = products[b, 3, i]
        _scales(factor, order, min_angle, scale, lower)
        for i in range(n):
            for lane in range(LANES):
                right[i, lane] = right[i, lane] * scale[i, lane] if scale[i, lane] != 0.0 else 0.0
            for j in range(n):
                for lane in range(LANES):
                    both = scale[i, lane] * scale[j, lane]
                    # whatever is there, finite or not
                    unit[i, j, lane] = unit[i, j, lane] * both if both != 0.0 else 0.0
            for lane in range(LANES):
                if scale[i, lane] == 0.0:
                    unit[i, i, lane] = 1.0
                elif first:
                    unit[i, i, lane] += ridge
                else:
                    unit[i, i, lane] = 1.0 + ridge
        _eliminate(unit, right, lower, factor)
        for lane in range(lanes):
            b, total, off, size = begin + lane, 0.0, 0.0, 0.0
            for i in range(n):
                value = 0.0
                for j in range(n):
                    value += unit[i, j, lane] * factor[j, 0, lane]
                off += abs(value - right[i, lane])
                size += abs(right[i, lane])
            if not off <= 1e-13 * size:  # small pivots, or NaN: exchange rows
                for i in range(n):
                    alone[i] = right[i, lane]
                    for j in range(n):
                        system[i, j] = unit[i, j, lane]
                _solve_in_place(system, alone)
                for i in range(n):
                    factor[i, 0, lane] = alone[i]
            for i in range(n):
                weights[b, i] = factor[i, 0, lane] * scale[i, lane] * (1.0 if first else -1.0)
                total += weights[b, i]
            if not math.isfinite(total):  # the plain step
                for i in range(n):
                    weights[b, i] = 0.0
    return weights


@compiled
def _update(products: Array, squares: Array, gram: Array, slot: int, first: bool) -> None:
    """Write the new row and column of one sample."""
    by_test, image_by_test, test_by_image = products[0], products[1], products[2]
    for j in range(by_test.shape[0]):
        if first:
            squares[j, slot] = by_test[j]
            squares[slot, j] = by_test[j]
            # S - F is positive on a contraction, R = F - S is not.
            gram[j, slot] = by_test[j] - image_by_test[j]
        else:
            gram[j, slot] = by_test[j]
            gram[slot, j] = by_test[j]
    if first:
        for j in range(by_test.shape[0]):
            gram[slot, j] = by_test[j] - test_by_image[j]


@compiled
def _scales(squares: Array, order: Array, min_angle: float, scale: Array, lower: Array) -> None:
    """One over the lengths; 0 for what newer differences span, by Cholesky from the newest on."""
    n = order.shape[0]
    for j in range(n):
        for lane in range(LANES):
            scale[j, lane] = 1.0 / math.sqrt(max(squares[j, j, lane], SMALLEST_SQUARE))
    if min_angle == 0.0:
        return
    for i in range(n):
        row = order[i]
        for k in range(i + 1):
            column = order[k]
            value = lower[i, k]
            for lane in range(LANES):
                value[lane] = squares[row, column, lane] * scale[row, lane] * scale[column, lane]
            for q in range(k):
                one, two = lower[i, q], lower[k, q]
                for lane in range(LANES):
                    value[lane] -= one[lane] * two[lane]
            # on the diagonal the inverse of the pivot, so that only it is divided by
            if i == k:
                for lane in range(LANES):
                    value[lane] = 1.0 / math.sqrt(value[lane] + ROUNDING)
            else:
                pivot = lower[k, k]
                for lane in range(LANES):
                    value[lane] *= pivot[lane]
    for i in range(n):
        for lane in range(LANES):
            if not min_angle * lower[i, i, lane] <= 1.0:  # so written, as a pivot may be NaN
                scale[order[i], lane] = 0.0


@compiled
def _eliminate(matrix: Array, right: Array, work: Array, solution: Array) -> None:
    """Solve without exchanging rows, all lanes at once, into solution[:, 0]."""
    n = right.shape[0]
    for i in range(n):
        for j in range(n):
            for lane in range(LANES):
                work[i, j, lane] = matrix[i, j, lane]
        for lane in range(LANES):
            solution[i, 0, lane] = right[i, lane]
    for k in range(n):
        pivot = work[k, k]
        for lane in range(LANES):
            pivot[lane] = 1.0 / pivot[lane]
        for i in range(k + 1, n):
            factor = work[i, k]
            for lane in range(LANES):
                factor[lane] *= pivot[lane]
            for j in range(k + 1, n):
                below, above = work[i, j], work[k, j]
                for lane in range(LANES):
                    below[lane] -= factor[lane] * above[lane]
            below, above = solution[i, 0], solution[k, 0]
            for lane in range(LANES):
                below[lane] -= factor[lane] * above[lane]
    for k in range(n - 1, -1, -1):
        value, pivot = solution[k, 0], work[k, k]
        for j in range(k + 1, n):
            above, solved = work[k, j], solution[j, 0]
            for lane in range(LANES):
                value[lane] -= above[lane] * solved[lane]
        for lane in range(LANES):
            value[lane] *= pivot[lane]


@compiled
def broyden_weights(
    products: Array,
    squares: Array,
    by_images: Array,
    born: Array,
    inverses: Array,
    covered: Array,
    rows: Array,
    slot: int,
    count: int,
    good: bool,
) -> Array:
    """Update the small matrices and solve for the weights (B, n) of the image differences.

    While pairs are only added, the inverse of the system (B, size, size) is bordered by one row
    and column, which takes n^2 operations where elimination takes n^3 / 3. `covered` (B,) says for
    how many pairs it is known. What it gives is checked; a sample that fails, as one whose oldest
    pair is replaced, is eliminated anew from then on.
    """
    batch, _, n = products.shape
    weights = np.empty((batch, n))
    system, right = np.empty((n, n)), np.empty(n)
    scale, above, before = np.empty(n), np.empty(n), np.empty(n)
    for b in range(batch):
        if rows[b]:
            born[b, slot] = count
        for j in range(n):
            squares[b, j, slot] = products[b, 0, j]
            squares[b, slot, j] = products[b, 0, j]
            if good:
                by_images[b, j, slot] = products[b, 1, j]
        if good:
            for j in range(n):
                by_images[b, slot, j] = products[b, 2, j]
        for i in range(n):
            right[i] = products[b, 3, i] if good else -products[b, 3, i]
        if covered[b] == n - 1 == slot == count and _bordered(
            inverses[b], squares[b], by_images[b], good, right, above, before, weights[b]
        ):
            covered[b] = n
            continue
        covered[b] = -1
        for j in range(n):
            length = squares[b, j, j]
            scale[j] = 1.0 / math.sqrt(length) if length > 0.0 else 0.0
        for i in range(n):
            right[i] *= scale[i]
            for j in range(n):
                value = squares[b, i, j] if born[b, i] <= born[b, j] else 0.0
                if good:
                    value -= by_images[b, i, j]
                system[i, j] = value * scale[i] * scale[j]
            if scale[i] == 0.0:  # a step of zero: weight 0
                system[i, i] += 1.0
        _solve_in_place(system, right)
        usable = True
        for j in range(n):
            right[j] *= scale[j]
            usable = usable and math.isfinite(right[j])
        for j in range(n):
            weights[b, j] = right[j] if usable else 0.0
    return weights


@compiled
def _bordered(
    inverse: Array,
    squares: Array,
    by_images: Array,
    good: bool,
    right: Array,
    above: Array,
    before: Array,
    weights: Array,
) -> bool:
    """Border the inverse by the newest pair and write the weights; whether they solve the system.

    With column c, row r and corner d of the newest pair, u = M^-1 c, v = r M^-1, and s = d - r u:

        [M c; r d]^-1 = [M^-1 + u v / s, -u / s; -v / s, 1 / s]
    """
    m = right.shape[0] - 1
    corner = squares[m, m] - (by_images[m, m] if good else 0.0)
    for i in range(m):
        above[i], before[i] = 0.0, 0.0
    for i in range(m):
        row, column, new = inverse[i], 0.0, -by_images[m, i] if good else 0.0
        for j in range(m):
            entry = squares[j, m] - by_images[j, m] if good else squares[j, m]
            column += row[j] * entry
        if new != 0.0:
            for j in range(m):
                before[j] += new * row[j]
        above[i] = column
    pivot = corner
    if good:
        for i in range(m):
            pivot += by_images[m, i] * above[i]
    share = 1.0 / pivot
    if not math.isfinite(share):
        return False
    for i in range(m):
        row, factor = inverse[i], above[i] * share
        for j in range(m):
            row[j] += factor * before[j]
        inverse[i, m] = -factor
    for j in range(m):
        inverse[m, j] = -share * before[j]
    inverse[m, m] = share
    size = 0.0
    for i in range(m + 1):
        row, value = inverse[i], 0.0
        for j in range(m + 1):
            value += row[j] * right[j]
        weights[i] = value
    off = 0.0  # of the new row, where all of the inverse has a part
    for j in range(m + 1):
        entry = -by_images[m, j] if good else 0.0
        if j == m:
            entry += squares[m, m]
        off += entry * weights[j]
        size += abs(entry * weights[j])
    solved = bool(abs(off - right[m]) <= 1e-9 * (size + abs(right[m])))
    return solved and math.isfinite(size)


@compiled
def _solve_in_place(matrix: Array, right: Array) -> None:
    """Gaussian elimination with row exchanges; a singular system leaves numbers not finite.

    The loops over rows run from 0 over slices, which is what the compiler can vectorise.
    """
    n = right.shape[0]
    for k in range(n):
        pivot = k
        for i in range(k + 1, n):
            if abs(matrix[i, k]) > abs(matrix[pivot, k]):
                pivot = i
        if pivot != k:
            for j in range(n):
                matrix[k, j], matrix[pivot, j] = matrix[pivot, j], matrix[k, j]
            right[k], right[pivot] = right[pivot], right[k]
        inverse, upper = 1.0 / matrix[k, k], matrix[k, k + 1 :]
        for i in range(k + 1, n):
            factor, row = matrix[i, k] * inverse, matrix[i, k + 1 :]
            if factor != 0:
                for j in range(row.shape[0]):
                    row[j] -= factor * upper[j]
                right[i] -= factor * right[k]
    for k in range(n - 1, -1, -1):
        row, solved, value = matrix[k, k + 1 :], right[k + 1 :], right[k]
        for j in range(row.shape[0]):
            value -= row[j] * solved[j]
        right[k] = value / matrix[k, k]
