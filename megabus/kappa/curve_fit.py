"""A law of this stage's own losses, with what remains of a transient after a growth or a start told apart from it.

    L(C) = E + A (C / C0)^-b + H exp(-(C - C_begin) / τ),   E, A, H >= 0

C is the FLOPs of the whole run: growth keeps the loss, so the curve goes on from a finite C. The last term, or its
absence, is the *bump*: the loss that a growth throws up while Adam's moments and the copies settle, gone after some
multiples of τ. Left out, a healing model looks like a law that flattens, whose end seems near.

For given (b, τ) the law is linear in (E, A, H), and solved in closed form. All pairs of two grids are solved at once,
without a bump too, and weighed by their likelihood (the noise's size integrated out), by a prior of b, and where there
is a bump by the share of its possible heights that the data leave (Occam's factor; MacKay 2003, chapter 28). The answer
is the mean over all of them, so its std holds what the curve does not tell: exponents, a bump, noise. The grids are
narrowed to where the likelihood lives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

B_RANGE = (0.02, 8.0)  # from nearly logarithmic to nearly exponential over a short stage
# Losses of language models fall as C^-0.15 to C^-0.6 above their floor (Hoffmann et al. 2022), and no healing model
# should pass for one of C^-5. The prior is normal in log b. A clear curve overrules it.
B_PRIOR = (0.35, 0.5)
# Of a bump in a grown stage and in a first one, its height anywhere up to the range of the losses. Of 40 predictions
# of `benchmarks.healing` at h 0.07 three are out by more than 3 std with 0.1, and four with 0.03, 0.5, 4, 10 or 30.
BUMP_ODDS, FIRST_ODDS = 0.1, 0.025
SHORTEST = 0.7  # bump, as a share of the distance between validations; the longest is as long as the stage so far
GRID = (33, 16)  # exponents, bumps
ZOOMS = 4
UNLIKELY = 12.0  # nats of likelihood below the best: left out
BISQUARE = 4.685  # 95% efficiency under Gaussian noise
ROUNDS = 2  # of finding outliers


@dataclass(frozen=True)
class CurveFit:
    """Laws of one curve with what each is worth. All fields but c0 and begin are (K,).

    x = (C / c0)^-b and y = exp(-(C - begin) / τ) are a law's columns. The variance of its loss at C is
    `variance` (spare + (x - x0, y - y0) [[xx, xy], [xy, yy]] (x - x0, y - y0)).
    """

    c0: float
    begin: float
    p: np.ndarray  # sums to 1
    b: np.ndarray
    tau: np.ndarray
    E: np.ndarray
    A: np.ndarray
    H: np.ndarray
    variance: np.ndarray
    spare: np.ndarray
    x0: np.ndarray
    y0: np.ndarray
    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray

    def predict(self, flops: float) -> tuple[float, float]:
        """Mean and std of L at `flops` in nats; inf: of E."""
        x = np.exp(-self.b * np.log(flops / self.c0))
        y = np.exp(-(flops - self.begin) / self.tau)
        loss = self.E + self.A * x + self.H * y
        dx, dy = x - self.x0, y - self.y0
        var = self.variance * (self.spare + dx * dx * self.xx + 2 * dx * dy * self.xy + dy * dy * self.yy)
        mean = float(self.p @ loss)
        return mean, float(np.sqrt(self.p @ (np.maximum(var, 0.0) + (loss - mean) ** 2)))

    @property
    def noise(self) -> float:
        """Std of a validation around its law, in nats."""
        return float(np.sqrt(self.p @ self.variance))

    def bump(self, flops: float) -> float:
        """Mean of what the transient adds to L at `flops`, in nats."""
        return float(self.p @ (self.H * np.exp(-(flops - self.begin) / self.tau)))

    def slope(self, flops: float) -> tuple[float, float]:
        """Mean and std of -dL/dC of the law without its bump at `flops`, in nats per FLOP."""
        per_a = self.b * np.exp(-self.b * np.log(flops / self.c0)) / flops
        slope = self.A * per_a
        mean = float(self.p @ slope)
        return mean, float(np.sqrt(self.p @ (self.variance * self.xx * per_a**2 + (slope - mean) ** 2)))

    def healed(self, flops: float) -> float:
        """Mean of L without its bump at `flops`, in nats."""
        return float(self.p @ (self.E + self.A * np.exp(-self.b * np.log(flops / self.c0))))

    def mixing(self) -> float:
        """FLOPs from the stage's begin until the bump is below a validation's noise: the median over all laws, 0 for
        one without.

        The mean of such times has in it what few laws say of a slow bump, which is a part of the law; so much the more
        the time at which the mean bump is gone. The second stage of test_marginal grows after 0.90 to 0.92 of the best
        FLOPs with the median, 0.86 to 0.88 with the mean of times, 0.78 to 0.82 with the mean bump (4 seeds).
        """
        noise = self.noise
        times = self.tau * np.log(np.maximum(self.H, noise) / noise)
        order = np.argsort(times)
        return float(times[order][np.searchsorted(np.cumsum(self.p[order]), 0.5)])

    def best(self, c: np.ndarray) -> np.ndarray:
        """L of the likeliest law at each of c."""
        i = int(np.argmax(self.p))
        x, y = (c / self.c0) ** -self.b[i], np.exp(-(c - self.begin) / self.tau[i])
        return np.asarray(self.E[i] + self.A[i] * x + self.H[i] * y)


def fit_curve(c: np.ndarray, loss: np.ndarray, begin: float) -> CurveFit:
    """c: (n,) FLOPs of the run, increasing, all > begin >= 0, the stage's begin; loss: (n,) finite, >= 0; n >= 5.

    A validation's weight is the share of the stage that was done by then: the first ones show warm-up, which no
    term stands for. Outliers are weighed down by their distance from the curve (Tukey's bisquare). What they are
    measured from is at first a law of running medians of three, so that none of them bends it.
    """
    weight = (c - begin) / (c[-1] - begin)
    w, data = weight, medians_of_three(loss)
    for _ in range(ROUNDS):
        r = np.abs(loss - _laws(c, data, w, begin, zooms=2).best(c))
        scale = max(1.4826 * float(np.median(r)), 1e-9 * float(loss.max()), 1e-300)
        w, data = weight * np.maximum(0.0, 1.0 - (r / (BISQUARE * scale)) ** 2) ** 2, loss
        if np.count_nonzero(w) < 5:  # half of the validations is far from the other half: no law tells which is right
            w = weight * np.minimum(1.0, scale / np.maximum(r, 1e-300))
    return _laws(c, data, w, begin, ZOOMS)


def medians_of_three(values: np.ndarray) -> np.ndarray:
    """Running medians of three neighbours, at both ends those of the first and of the last three. (n >= 3,)"""
    inner = np.median(np.stack([values[:-2], values[1:-1], values[2:]]), axis=0)
    return np.concatenate([inner[:1], inner, inner[-1:]])


def _laws(c: np.ndarray, loss: np.ndarray, weight: np.ndarray, begin: float, zooms: int) -> CurveFit:
    log_c, since = np.log(c / c[0]), c - begin
    count = float(weight.sum() ** 2 / np.sum(weight**2))  # Kish's effective number of validations
    w = weight * (count / weight.sum())
    span_b = np.log(B_RANGE)
    shortest = SHORTEST * float(np.median(np.diff(c)))
    span_t = np.log([shortest, max(float(since[-1]), 2 * shortest)])
    range_b, range_t = span_b, span_t
    odds = BUMP_ODDS if begin > 0 else FIRST_ODDS
    for zoom in range(zooms):
        log_b, log_t = np.linspace(range_b[0], range_b[1], GRID[0]), np.linspace(range_t[0], range_t[1], GRID[1])
        b, tau = np.exp(log_b), np.concatenate([[1.0], np.exp(log_t)])
        x, y = np.exp(-b[:, None] * log_c), np.exp(-since / tau[:, None])
        y[0] = 0.0  # no bump
        log_p, fields = _solve(x, y, loss, w, count)
        log_p -= 0.5 * ((log_b - np.log(B_PRIOR[0])) / B_PRIOR[1]) ** 2
        log_p[1:] += np.log(odds * (range_t[1] - range_t[0]) / (span_t[1] - span_t[0]) / GRID[1])  # a cell's prior
        likely = log_p > log_p.max() - UNLIKELY
        if zoom < zooms - 1:
            range_b = _around(log_b, likely.any(axis=0))
            if likely[1:].any():
                range_t = _around(log_t, likely[1:].any(axis=1))
    p = np.exp(log_p[likely] - log_p.max())
    every_b, every_t = np.broadcast_arrays(b[None], tau[:, None])
    chosen = {name: np.broadcast_to(field, likely.shape)[likely] for name, field in fields.items()}
    return CurveFit(float(c[0]), begin, p / p.sum(), every_b[likely], every_t[likely], **chosen)


def _around(grid: np.ndarray, likely: np.ndarray) -> np.ndarray:
    """The ends of what is likely, with a cell more on either side."""
    found = np.flatnonzero(likely)
    return grid[[max(found[0] - 1, 0), min(found[-1] + 1, len(grid) - 1)]]


def _solve(
    x: np.ndarray, y: np.ndarray, loss: np.ndarray, w: np.ndarray, count: float
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Weighted least squares of loss = E + A x + H y, with E, A, H >= 0, for every pair of columns.

    x: (B, n); y: (T, n), the first of them 0: no bump; loss, w: (n,), w summing to `count`. Returns the log likelihood
    (T, B), -inf where H would be negative (no bump is better), and the fields of a `CurveFit` that broadcast to it.
    """
    root = np.sqrt(w)
    x0, y0, mean = x @ w / count, y @ w / count, float(loss @ w) / count
    by_mean = _pair((x - x0[:, None]) * root, (y - y0[:, None]) * root, (loss - mean) * root)
    by_zero = _pair(x * root, y * root, loss * root)
    x0, y0 = np.broadcast_arrays(x0[None], y0[:, None])
    E = mean - by_mean["A"] * x0 - by_mean["H"] * y0
    free = E >= 0  # otherwise E = 0
    parts = {name: np.where(free, by_mean[name], by_zero[name]) for name in by_mean}
    fields = {"E": np.where(free, E, 0.0), "spare": np.where(free, 1 / count, 0.0)}
    fields |= {"x0": np.where(free, x0, 0.0), "y0": np.where(free, y0, 0.0)}
    # Sums of squares are exact to 1e-15 of what they are differences of.
    floor = 1e-15 * float((loss - mean) ** 2 @ w) + (1e-13 * float(loss.max())) ** 2 * count + 1e-300
    rss = np.maximum(parts.pop("rss"), 0.0) + floor
    bump = np.arange(len(y))[:, None] > 0
    # Student's t has more variance than the normal distribution: hence 2 less than the degrees of freedom.
    fields |= parts | {"variance": rss / np.maximum(count - 4 - bump, 1.0)}
    # A bump costs a degree of freedom, and the std of its height has one factor of the noise: with that integrated out,
    # both are of the same power, and the loss's unit tells nothing.
    log_p = -0.5 * max(count - 2, 1.0) * np.log(rss)
    height = np.sqrt(2 * np.pi * fields["variance"] * fields["yy"]) / max(float(np.ptp(loss)), 1e-300)
    log_p += np.where(bump, np.log(np.clip(height, 1e-300, 1.0)), 0.0)
    return np.where((parts["A"] < 0) | (parts["H"] < 0), -np.inf, log_p), fields


def _pair(x: np.ndarray, y: np.ndarray, loss: np.ndarray) -> dict[str, np.ndarray]:
    """loss = A x + H y for every pair of columns (each times the root of its weight): A, H, the residuals' squares, and
    the inverse [[xx, xy], [xy, yy]] of the normal matrix, all (T, B). A is not below 0; then H alone is fitted."""
    sxx = np.maximum(np.einsum("bn,bn->b", x, x), 1e-300)[None]
    syy = np.einsum("tn,tn->t", y, y)[:, None]
    syy = np.where(syy > 0, syy, 1.0)  # no bump: H is 0 / 1
    sxl, syl, sxy = (x @ loss)[None], (y @ loss)[:, None], y @ x.T
    det = np.maximum(sxx * syy - sxy**2, 1e-10 * sxx * syy)  # columns that are alike
    A, H = (sxl * syy - syl * sxy) / det, (syl * sxx - sxl * sxy) / det
    flat = A < 0
    A, H = np.where(flat, 0.0, A), np.where(flat, syl / syy, H)
    rss = loss @ loss - 2 * (A * sxl + H * syl) + A**2 * sxx + H**2 * syy + 2 * A * H * sxy
    inverse = {"xx": syy / det, "xy": -sxy / det, "yy": sxx / det}
    return {"A": A, "H": H, "rss": rss} | {
        "xx": np.where(flat, 0.0, inverse["xx"]),
        "xy": np.where(flat, 0.0, inverse["xy"]),
        "yy": np.where(flat, 1 / syy, inverse["yy"]),
    }
