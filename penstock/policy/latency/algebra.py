"""Linear algebra for a handful of unknowns, in plain Python: a simulation must not depend on how a BLAS adds up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

Rows = Sequence[Sequence[float]]  # of a matrix
Matrix = list[list[float]]


def solve_nonnegative(matrix: Rows, vector: Sequence[float]) -> list[float]:
    """The x >= 0 that minimises x'Mx/2 - v'x, for a symmetric `matrix` that is positive definite, or nearly.

    Principal pivoting on one variable at a time, the last that is wrong first (Murty 1974): always ends, and for the
    few variables here in a few rounds.
    """
    free = [True] * len(vector)
    for _ in range(2 ** len(vector)):
        solution = _solve_for(matrix, vector, free)
        pull = [v - p for v, p in zip(vector, times(matrix, solution), strict=True)]
        wrong = [
            i for i, is_free in enumerate(free) if (solution[i] < 0 if is_free else pull[i] > 1e-9 * abs(vector[i]))
        ]
        if not wrong:
            break
        free[wrong[-1]] = not free[wrong[-1]]
    return [max(0.0, part) for part in solution]


def _solve_for(matrix: Rows, vector: Sequence[float], free: Sequence[bool]) -> list[float]:
    """The solution with the variables that are not `free` held at 0."""
    chosen = [i for i, is_free in enumerate(free) if is_free]
    lower = _cholesky([[matrix[i][j] for j in chosen] for i in chosen])
    solved = _substitute(lower, [vector[i] for i in chosen])
    solution = [0.0] * len(vector)
    for i, value in zip(chosen, solved, strict=True):
        solution[i] = value
    return solution


def _cholesky(matrix: Rows) -> Matrix:
    """The lower triangle L with LL' = `matrix`; a direction about which nothing is known counts as barely known."""
    lower: Matrix = []
    for i, row in enumerate(matrix):
        line: list[float] = []
        for j in range(i):
            line.append((row[j] - dot(line, lower[j][:j])) / lower[j][j])
        rest = row[i] - dot(line, line)
        line.append(math.sqrt(max(rest, 1e-12 * row[i], 1e-12)))
        lower.append(line)
    return lower


def _substitute(lower: Rows, vector: Sequence[float]) -> list[float]:
    """The x with LL'x = `vector`."""
    half: list[float] = []
    for row, value in zip(lower, vector, strict=True):
        half.append((value - dot(half, row[:-1])) / row[-1])
    solution = [0.0] * len(half)
    for i in reversed(range(len(half))):
        later = sum(lower[j][i] * solution[j] for j in range(i + 1, len(half)))
        solution[i] = (half[i] - later) / lower[i][i]
    return solution


def inverse(matrix: Rows) -> Matrix:
    lower = _cholesky(matrix)
    size = range(len(matrix))
    return [_substitute(lower, [float(i == j) for j in size]) for i in size]


def scaled(matrix: Rows, scale: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Rows and columns times `scale`."""
    return frozen(
        [[a * b * entry for b, entry in zip(scale, row, strict=True)] for a, row in zip(scale, matrix, strict=True)]
    )


def frozen(matrix: Rows) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix)


def times(matrix: Rows, vector: Sequence[float]) -> list[float]:
    return [dot(row, vector) for row in matrix]


def dot(left: Sequence[float], right: Sequence[float]) -> float:
    total: float = sum(map(mul, left, right))  # a third of the time of a generator
    return total
