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
    unit, factor, right, scale = np.empty((n, n)), np.empty((n, n)), np.empty(n), np.empty(n)
    order = np.empty(n, np.int64)  # newest first
    for i in range(n):
        order[i] = (slot - i) % n
    for b in range(batch):
        by_test, image_by_test = products[b, 0], products[b, 1]
        test_by_image, residual_by_test = products[b, 2], products[b, 3]
        small = gram[b]
        if first:
            for j in range(n):
                squares[b, j, slot] = by_test[j]
                squares[b, slot, j] = by_test[j]
                # S - F is positive on a contraction, R = F - S is not.
                small[j, slot] = by_test[j] - image_by_test[j]
            for j in range(n):
                small[slot, j] = by_test[j] - test_by_image[j]
            _scales(squares[b], order, min_angle, scale, factor)
        else:
            for j in range(n):
                small[j, slot] = by_test[j]
                small[slot, j] = by_test[j]
            _scales(small, order, min_angle, scale, factor)
        for i in range(n):
            right[i] = scale[i] * residual_by_test[i]
            for j in range(n):
                unit[i, j] = small[i, j] * scale[i] * scale[j]
                if scale[i] == 0.0 or scale[j] == 0.0:
                    unit[i, j] = 0.0  # whatever is there, finite or not
            if scale[i] == 0.0:
                right[i], unit[i, i] = 0.0, 1.0
            elif first:
                unit[i, i] += ridge
            else:
                unit[i, i] = 1.0 + ridge
        _solve_in_place(unit, right)
        total = 0.0
        for j in range(n):
            right[j] *= scale[j] if first else -scale[j]
            total += right[j]
        usable = math.isfinite(total)  # else the plain step
        for j in range(n):
            weights[b, j] = right[j] if usable else 0.0
    return weights


@compiled
def _scales(squares: Array, order: Array, min_angle: float, scale: Array, factor: Array) -> None:
    """One over the lengths; 0 for what newer differences span, by Cholesky from the newest on."""
    n = order.shape[0]
    for j in range(n):
        scale[j] = 1.0 / math.sqrt(max(squares[j, j], SMALLEST_SQUARE))
    if min_angle == 0.0:
        return
    for i in range(n):
        row = order[i]
        for k in range(i + 1):
            column = order[k]
            value = squares[row, column] * scale[row] * scale[column]
            if i == k:
                value += ROUNDING
            for q in range(k):
                value -= factor[i, q] * factor[k, q]
            # on the diagonal the inverse of the pivot, so that only it is divided by
            factor[i, k] = 1.0 / math.sqrt(value) if i == k else value * factor[k, k]
    for i in range(n):
        if not min_angle * factor[i, i] <= 1.0:  # so written, because a pivot may be NaN
            scale[order[i]] = 0.0


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
