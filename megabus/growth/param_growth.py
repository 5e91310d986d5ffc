"""What a growth makes of every parameter, worked out once: `Growth.param` answers all that is asked about one of them.

`ParamGrowth` joins the maps (`maps.py`), the manner of growing and the parameter's declaration. No other code acts on
`growth.write`, `read` or `moments`. What `channels` and `depth` do to axes and layers is worked out in `maps.py`, and
which models a depth fits is checked in `config/pair.py`; both read the table in `config/depth.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megabus import counter
from megabus.config import RunConfig, Stage
from megabus.config.depth import DEPTHS
from megabus.config.schema import GrowthConfig, ModelConfig
from megabus.growth.maps import (
    AxisMap,
    LayerSource,
    axis_maps,
    channel_scale,
    layer_sources,
    spread,
)
from megabus.model.decoder import param_specs
from megabus.model.params import ParamSpec, axis_sizes, global_shape
from megabus.parallel.fragments import EMA, KINDS, MOMENTS, Kind, ema_kinds


@dataclass(frozen=True)
class ReadTilt:
    """Read rows become keep * w + length * c, with c a random unit vector that no grown h has anything of.

    relative: rows are unit vectors, so that the length is also one in lengths of w: it is that for running means of
    them, which are shorter, and so turn as far.
    """

    keep: float
    length: float
    relative: bool


@dataclass(frozen=True, eq=False)
class MomentGrowth:
    """A new entry of an Adam moment is the old entry that it copies, times these.

    rows: (rows,); channels: (width,), a power of E's entries; factor: of the whole parameter.
    """

    rows: np.ndarray
    channels: np.ndarray
    factor: float


@dataclass(frozen=True, eq=False)
class ParamGrowth:
    """All that there is to know of how one new parameter grows. A gain is a matrix whose rows have one entry.

    name, source: of the new parameter, and of the old one that it grows from.
    rows, channels: which old row every new row copies, and which old entry of it every new entry.
    scale: (width,) E's entries, by which copied channels are multiplied (1 for gains).
    read_tilt: how rows turn towards new channels, or None. write_tilt: whether copies of a row tilt away from it.
    key: of the directions that are drawn for either tilt.
    multiplier, cosine, divisor, gate: after all that a weight is multiplied by `multiplier` (which keeps what a gain's
        raw value stands for), divided by `cosine` (of a read tilt that a gain makes up for) and by `divisor` ((rows,),
        of cloned rows; None for 1), and multiplied by `gate`.
    sphere: 0, or what a raw gate is multiplied by to be the alpha whose share `gate` is taken on the sphere.
    moments: of both Adam moments.
    live: by sort of kind, the rows that are grown from anything at all, (rows,) bool; the others are zeros.
    mixing: by sort of kind, the rows of which every entry depends on all of the old row, (rows,) bool.
    added: the rows that the growth has added to those that were there, (rows,) bool.
    """

    name: str
    source: str
    rows: AxisMap
    channels: AxisMap
    scale: np.ndarray
    read_tilt: ReadTilt | None
    write_tilt: bool
    key: int
    multiplier: float
    cosine: float
    divisor: np.ndarray | None
    gate: float
    sphere: float
    moments: Mapping[Kind, MomentGrowth]
    live: Mapping[Kind, np.ndarray]
    mixing: Mapping[Kind, np.ndarray]
    added: np.ndarray

    @property
    def width(self) -> int:
        """Entries of a new row."""
        return len(self.channels)


@dataclass(frozen=True)
class Growth:
    """One growth: from a model to a larger one, in a given manner, with randomness from `seed`."""

    old: ModelConfig
    new: ModelConfig
    how: GrowthConfig
    seed: int
    means: tuple[Kind, ...] = ()  # running means of the weights, which are sent and grown as these are

    def param(self, name: str) -> ParamGrowth:
        """How a parameter of the new model, which has a source, grows. Worked out when first asked for, and kept."""
        if name not in self._params:
            self._params[name] = self._compile(param_specs(self.new)[name])
        return self._params[name]

    def source(self, name: str) -> str | None:
        """The old parameter that a new one grows from; None for one that is drawn as the initial weights are, and whose
        moments are zero. No run draws a name twice, so the run's seed serves for this, too."""
        spec = param_specs(self.new)[name]
        layer = self.layer_source(spec)
        return None if layer is None else spec.in_layer(layer.parent)

    def added(self, name: str) -> np.ndarray:
        """The rows of a new parameter that the growth has added to those that were there, (rows,) bool."""
        if self.source(name) is None:
            return np.ones(global_shape(param_specs(self.new)[name], self.new)[0], bool)
        return self.param(name).added

    @property
    def sent_kinds(self) -> tuple[Kind, ...]:
        """The tensors that are sent and grown once a run has taken steps."""
        return (*(KINDS[:1] if self.how.moments == "reset" else KINDS), *self.means)

    def layer_source(self, spec: ParamSpec) -> LayerSource | None:
        """Origin of the layer that a parameter of the new model lives in (itself, outside the layers); None where that
        is drawn."""
        if spec.layer is None:
            return LayerSource(0, 0, 1)
        return layer_sources(self.old.n_layers, self.new.n_layers, self.how.depth)[spec.layer]

    @cached_property
    def _params(self) -> dict[str, ParamGrowth]:
        return {}

    @cached_property
    def _alike(self) -> dict[tuple[str, bool, LayerSource], ParamGrowth]:
        """By namesake and origin of the layer: one that others share their arrays with."""
        return {}

    def _compile(self, spec: ParamSpec) -> ParamGrowth:
        layer = self.layer_source(spec)
        assert layer is not None, f"{spec.name} grows from nothing"
        like = (spec.namesake, spec.layer is None, replace(layer, parent=0))
        if like not in self._alike:
            self._alike[like] = _compile(self, spec, layer)
        one = self._alike[like]
        key = counter.key(self.seed, spec.name, _PURPOSE.get(spec.role), one.width, len(one.rows))
        return replace(one, name=spec.name, source=spec.in_layer(layer.parent), key=key)

    @cached_property
    def cosine(self) -> float:
        """What unit rows that tilt towards new channels keep of themselves; 1 where none tilt.

        Old channels keep what they have of a random direction, sqrt(d/d').
        """
        if self.how.read != "tilt" or self.new.d_model == self.old.d_model:
            return 1.0
        return float(np.sqrt(self.old.d_model / self.new.d_model))

    @cached_property
    def unit(self) -> bool:
        """Whether rows are unit vectors, as in nGPT."""
        return any(spec.unit for spec in param_specs(self.new).values())


_PURPOSE = {"read": "read", "write": "tilt"}
_ONE_CHANNEL = spread(1, 1)  # of gains


def growth_between(config: RunConfig, old: Stage, new: Stage) -> Growth:
    """The seed is the run's: directions are keyed by parameter, row and new shape, so no two growths share any."""
    return Growth(old.model, new.model, config.growth, config.train.seed, means=ema_kinds(config.train.ema))


def _compile(growth: Growth, spec: ParamSpec, layer: LayerSource) -> ParamGrowth:
    how, axes = growth.how, axis_maps(growth.old, growth.new)
    old, rows, channels = param_specs(growth.old)[spec.in_layer(layer.parent)], axes[spec.rows], _ONE_CHANNEL
    a = channel_scale(axes["embed"], how.channels)
    scale, gate = np.ones(1), layer.gate(how.depth, spec.branch) if spec.gate else 1.0
    if spec.is_matrix:
        channels, scale = axes["embed"], a
    # On the embed axis nothing is new, for there is no original to prefer: E spreads each channel over its copies.
    added = ((rows.copy != 0) & (spec.rows != "embed")) | (layer.copy != 0)
    write_tilt = spec.role == "write" and how.write == "tilt"
    shares = {kind: _share(growth, spec, layer, kind, rows, added) for kind in MOMENTS}
    none, live, tilt = np.zeros(len(rows), bool), np.full(len(rows), gate != 0), _read_tilt(growth, spec)
    tilted = (rows.copies > 1) & write_tilt
    turned = np.full(len(rows), tilt is not None and tilt.relative)
    return ParamGrowth(
        name=spec.name,
        source=old.name,
        rows=rows,
        channels=channels,
        scale=scale,
        read_tilt=tilt,
        write_tilt=write_tilt,
        key=0,
        multiplier=old.multiplier / spec.multiplier,  # a gain acts as raw * multiplier: that product is what stays
        cosine=growth.cosine if spec.compensates_read_tilt else 1.0,
        divisor=rows.copies.astype(np.float64) if how.write == "clone" and _divided(spec) else None,
        gate=gate,
        sphere=spec.multiplier if spec.gate and growth.unit and DEPTHS[how.depth].gates == "tapered" else 0.0,
        moments={kind: _moment(growth, spec, old, kind, a, shares[kind]) for kind in MOMENTS},
        live={"weight": live, EMA: live} | {kind: share != 0 for kind, share in shares.items()},
        mixing={"weight": tilted, EMA: tilted | turned, "exp_avg": none, "exp_avg_sq": none},
        added=added,
    )


def _read_tilt(growth: Growth, spec: ParamSpec) -> ReadTilt | None:
    """cos w + sin c of unit rows. Other rows keep what they are and get as many fresh entries as there are new
    channels: `init` is the standard deviation of entries."""
    if spec.role != "read" or spec.lookup or growth.cosine == 1:
        return None
    if spec.unit:
        return ReadTilt(growth.cosine, (1 - growth.cosine**2) ** 0.5, relative=True)
    return ReadTilt(1.0, spec.init * (growth.new.d_model - growth.old.d_model) ** 0.5, relative=False)


def _share(
    growth: Growth, spec: ParamSpec, layer: LayerSource, kind: Kind, rows: AxisMap, added: np.ndarray
) -> np.ndarray:
    """What each new row gets of its parent's gradient, in the mean or in the root mean square: (rows,) fp64.

    `carry` keeps only originals; `grow` maps everything; `reset` starts from zero. Copies of a read row (or of its
    gain) share their family's gradient, while each tilted copy of a write row sees all of it. So it is with layers
    that share a gate: the gate sees all of its gradient, and what is behind it, originals too, the gate's share.
    (On the sphere a gate that has shrunk sees ((1 - alpha) / (1 - alpha_k))^2 of it, but moments do not know alpha.)
    """
    if growth.how.moments == "reset":
        return np.zeros(len(rows))
    shared = DEPTHS[growth.how.depth].shares_gates and spec.branch and not spec.gate
    behind = layer.gate(growth.how.depth, spec.branch) if shared else 1.0
    if growth.how.moments == "carry":
        return behind * (~added)
    return behind * _row_share(growth, spec, kind, rows)


def _row_share(growth: Growth, spec: ParamSpec, kind: Kind, rows: AxisMap) -> np.ndarray:
    """See `_share`; of rows within their layer, when all moments grow."""
    if growth.how.write == "clone":
        return _clone_share(growth, spec, rows)
    # A tilted copy sees delta . w_k where its parent saw delta . w. On average over directions that is a share 1/n of
    # it, but w_k is as long as w: the square is as large (a test measures it).
    shared = spec.role != "write" and spec.rows != "embed" and kind == "exp_avg"
    return 1.0 / rows.copies if shared else np.ones(len(rows))


def _divided(spec: ParamSpec) -> bool:
    """Whether clones of this are divided by their number, so that they sum to their parent: write rows, or where these
    are unit rows, which cannot shrink, a gain of their unit."""
    return spec.compensates_clones or (spec.role == "write" and not spec.unit)


def _clone_share(growth: Growth, spec: ParamSpec, rows: AxisMap) -> np.ndarray:
    """What plain clones get of their parent's gradient: (rows,). All of it where they have been divided themselves;
    else 1/n, for something that they are multiplied with has been.

    But nothing of nGPT's heads is divided: the branch's output x is longer instead, and since it is normalised next,
    its gradient is shorter, by |x| / |x'| for all heads alike. Where each has n clones that is 1/n. Where they have
    c_i, it is near (mean c_i^2)^-1/2, since what different heads write is nearly orthogonal. A key head adds up what
    its queries see, and may have more of them than before.
    """
    if spec.rows == "embed" or _divided(spec):
        return np.ones(len(rows))
    if not growth.unit or spec.rows not in ("heads", "kv_heads"):
        return 1.0 / rows.copies
    heads, old = axis_maps(growth.old, growth.new)["heads"], axis_sizes(growth.old)
    shorter = (heads.copies.sum() / old["heads"]) ** -0.5  # every c_i stands there c_i times
    queries = (len(heads) / len(rows)) / (old["heads"] / old[spec.rows])
    return np.full(len(rows), shorter * queries)


def _moment(
    growth: Growth, spec: ParamSpec, old: ParamSpec, kind: Kind, a: np.ndarray, share: np.ndarray
) -> MomentGrowth:
    """Moments follow the gradient: m like g, v like g^2. A loss that is a function of E w has gradient a * g on the
    copies of an entry."""
    power = 1 if kind == "exp_avg" else 2
    rows, channels = share**power, np.ones(1)
    factor = (spec.multiplier / old.multiplier) ** power
    if spec.compensates_read_tilt:
        factor *= growth.cosine**power
    if spec.is_matrix:
        channels = a ** _channel_power(growth, spec, kind)
        if spec.unit and _read_tilt(growth, spec):  # what it reads shrank by the cosine, which is made up for
            rows = rows / growth.cosine**power
    elif spec.rows == "embed":
        rows = rows * a ** _channel_power(growth, spec, kind)
    return MomentGrowth(rows, channels, factor)


def _channel_power(growth: Growth, spec: ParamSpec, kind: Kind) -> int:
    """What power of a the moment has on the copies of a channel.

    The gradient of E w is a g. Where unit rows have turned to see all channels, what h is made of gets a gradient in
    all of them: E's part, a g, and in the mean square (1 - a^2) g^2 outside of E's image, g^2 together. A gain of a
    channel of a branch multiplies that with an entry of the branch, which is E's: a more.
    """
    power, branch = (1 if kind == "exp_avg" else 2), 0 if spec.is_matrix else 1
    seen = growth.cosine < 1 and growth.unit and _read_tilt(growth, spec) is None and kind == "exp_avg_sq"
    return power * ((0 if seen else 1) + branch)
