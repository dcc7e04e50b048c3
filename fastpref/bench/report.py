"""Output of a run: a JSON file, a table for the terminal, a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastpref.utils import result_json

MIB = 2**20
# The same color in every picture.
_COLORS = {
    "gemm": "#000000",
    "fastpref triton": "#00798c",
    "fastpref cpu": "#00798c",
    "fastpref chunked": "#66b2b2",
    "torch full logits": "#d1495b",
    "torch linear_cross_entropy": "#8d6a9f",
    "torch linear_cross_entropy, sum": "#c3aed6",
    "liger cross entropy, sum": "#e09f3e",
    "cce": "#3a7d44",
    "cce, no filter": "#9bc53d",
    "trl chunked log-prob": "#5c6b8a",
}
Curve = list[tuple[int, float]]


def write(path: Path, header: dict[str, Any], points: Sequence[dict[str, Any]]) -> None:
    """Write the report; an earlier one is replaced."""
    path.write_text(result_json.dumps({**header, "points": points}))


def table(points: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for the points of one problem."""
    p = points[0]
    lines = [
        "",
        f"{p['op']}, head {p['head']}, T {p['T']}, D {p['D']}, V {p['V']}, {p['dtype']}",
        f"  {'':33}{'median':>9}{'× gemm':>8}{'TFLOP/s':>9}{'MiB':>7}{'error':>9}{'gradient':>9}",
    ]
    for p in points:
        lines.append(f"  {p['implementation']:33}" + (p.get("failed") or _figures(p)))
    return lines


def draw(points: Sequence[dict[str, Any]], path: Path) -> Path:
    """Plot time and extra memory of the frozen head against V and T, a line for each name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    names: dict[str, Any] = {}
    for column, axis_name in zip(axes.T, ("V", "T"), strict=True):
        fixed, swept = sweep(points, axis_name)
        for axis, (title, unit) in zip(column, _PANELS.items(), strict=True):
            for name, curve in curves(swept, axis_name, unit).items():
                (line,) = axis.plot(*zip(*curve, strict=True), **_style(name))
                names.setdefault(_short(name), line)
            axis.set_title(f"{title}, against {axis_name} ({fixed})", fontsize=11)
            _finish(axis, axis_name, sorted({p[axis_name] for p in swept}), unit)
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle("Token log-probs, forward and backward, head frozen")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def sweep(points: Iterable[dict[str, Any]], axis: str) -> tuple[str, list[dict[str, Any]]]:
    """The largest set of points of the frozen head that differ in one dimension only.

    Also returns its other dimensions, as a label.
    """
    others = [key for key in "TDV" if key != axis]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for p in points:
        if (p["op"], p["head"]) == ("linear_logps", "frozen") and "failed" not in p:
            key = (*(p[name] for name in others), p["dtype"], p["chunk_bytes"])
            groups.setdefault(key, []).append(p)
    if not groups:
        return "not measured", []
    key = max(groups, key=lambda key: len({p[axis] for p in groups[key]}))
    fixed = ", ".join(f"{name} {value}" for name, value in zip(others, key, strict=False))
    return f"{fixed}, {key[2]}", groups[key]


def curves(points: Iterable[dict[str, Any]], axis: str, unit: str) -> dict[str, Curve]:
    """(x, y) by implementation, in the order of x; y is seconds or MiB."""
    by_name: dict[str, Curve] = {}
    for p in points:
        y = p["seconds"]["median"] if unit == "seconds" else (p.get("extra_bytes") or 0) / MIB
        if y > 0:
            by_name.setdefault(p["implementation"], []).append((p[axis], y))
    return {name: sorted(curve) for name, curve in by_name.items()}


_PANELS = {"time": "seconds", "extra memory": "MiB"}


def _figures(p: dict[str, Any]) -> str:
    over = p["over_yardstick"]
    extra = p.get("extra_bytes")
    errors = p.get("errors", {})
    values = [
        f"{_seconds(p['seconds']['median']):>9}",
        f"{over['median']:8.2f}" if over else f"{'':8}",
        f"{p['tflops']:9.3g}",
        f"{'' if extra is None else format(extra / MIB, '.0f'):>7}",
        f"{_scientific(errors.get('logps_max', errors.get('value'))):>9}",
        f"{_scientific(errors.get('grad_weight', errors.get('grad_hidden'))):>9}",
    ]
    return "".join(values) + ("  once" if p["rounds"] == 1 else "")


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1000:.2f} ms"


def _scientific(x: float | None) -> str:
    return "" if x is None else f"{x:.0e}"


def _short(name: str) -> str:
    return "gemm" if name.startswith("gemm") else name


def _style(name: str) -> dict[str, Any]:
    ours = name.startswith("fastpref")
    # Dashes let a curve below show through.
    dashes = {"gemm": ":", "fastpref chunked": "--"}
    return {
        "color": _COLORS.get(_short(name), "#7f7f7f"),
        "linestyle": dashes.get(_short(name), "-"),
        "linewidth": 2.2 if ours else 1.4,
        "marker": "o",
        "markersize": 4,
        "zorder": 3 if ours else 2,
    }


def _finish(axis: Any, name: str, ticks: list[int], unit: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ticks, [_thousands(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel({"V": "vocabulary", "T": "completion tokens"}[name])
    axis.set_ylabel(unit)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _thousands(x: int) -> str:
    return f"{x // 1024}k" if x % 1024 == 0 else f"{x:,}"
