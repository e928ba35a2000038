"""A few numbers per row that say how near it can be at most, so that most rows need not be compared."""

import numpy as np

WIDTH_REDUCTION = 8  # one number for eight of a row
POWER_ITERATIONS = 2  # of power iteration: the directions need not be the best ones, any are right
SINGLE_THREAD_NUMBERS = 8_192  # numbers of a matrix that BLAS multiplies in the calling thread; above, it wakes others, for which a busy machine waits
SINGLE_THREAD_QUERIES = (
    32  # at a time, for the same reason: on two busy cores 0.04 ms become 3 ms otherwise, and 0.4 become 4 and more
)
ROUNDING_MARGIN = (
    1e-5  # of a squared length: more than float32 sums can be off, so that a bound may be too high but never too low
)


class BoundProjection:
    """Inner products of sketches are never below those of the rows themselves.

    A row is split into its part within the few directions in which rows differ most, and the rest: the former is multiplied out, of the
    rest only the length is kept, and no two rests have a greater product than their lengths. How tight that is depends on the rows, that
    it holds does not.
    """

    def __init__(self, rows: np.ndarray) -> None:
        """rows: (n, Dk) float32, of the kind that will be compared."""
        width = rows.shape[1]
        basis = np.random.default_rng(0).standard_normal((width, max(1, width // WIDTH_REDUCTION)), np.float32)
        for _ in range(POWER_ITERATIONS):
            basis, _upper = np.linalg.qr(rows.T @ (rows @ basis))
        self.width = basis.shape[1] + 1
        self._basis = np.ascontiguousarray(basis.T, np.float32)  # (m, Dk), orthonormal

    def of(self, rows: np.ndarray) -> np.ndarray:
        """(n, m + 1) float32: the part within the basis, then the length of the rest.  rows: (n, Dk) float32."""
        within = inner_products(self._basis, rows).T
        whole = np.einsum("nd,nd->n", rows, rows)
        rest = whole - np.einsum("nm,nm->n", within, within)
        return np.hstack([within, np.sqrt(np.maximum(rest, 0) + ROUNDING_MARGIN * whole)[:, None]])


def inner_products(rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(n, B) float32 inner products, by one thread whatever the size.  rows: (n, D) float32.  queries: (B, D) float32."""
    block = max(1, SINGLE_THREAD_NUMBERS // rows.shape[1])
    whole = len(rows) // block * block
    found = np.empty((len(rows), len(queries)), np.float32)
    for start in range(0, len(queries), SINGLE_THREAD_QUERIES):
        some = slice(start, start + SINGLE_THREAD_QUERIES)
        asked = np.ascontiguousarray(queries[some].T)  # (D, ≤ QUIET_QUERIES)
        found[:whole, some] = (rows[:whole].reshape(whole // block, block, rows.shape[1]) @ asked).reshape(
            whole, asked.shape[1]
        )
        found[whole:, some] = rows[whole:] @ asked
    return found
