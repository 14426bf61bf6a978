"""Patterns that begin in the top graph and end in a branch: passes treat them rightly, or leave them alone."""

from __future__ import annotations

import numpy as np
import pytest

from qdqtool import pipeline
from qdqtool.graphs import model as models
from tests.builders import Array, normal, parse, run, weight

CONSTANTS: dict[str, Array] = {
    "w": weight(8, 8, 3, 3),
    "b": normal(8),
    "g": np.abs(normal(8)) + 0.5,
    "beta": normal(8, seed=3),
    "mean": normal(8, seed=4),
    "var": np.abs(normal(8, seed=5)) + 0.5,
    "k": normal(8, 1, 1),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "half": np.array(0.5, np.float32),
    "one": np.array(1, np.float32),
    "root": np.array(np.sqrt(2), np.float32),
}
CHAINS = {
    "fold-pad": ["p = Pad(x, pads)", "c = Conv(p, w, b)", "z = Relu(c)"],
    "fold-batchnorm": ["c = Conv(x, w, b)", "n = BatchNormalization(c, g, beta, mean, var)", "z = Relu(n)"],
    "fold-scale-shift": ["c = Conv(x, w, b)", "m = Mul(c, k)", "z = Add(m, k)"],
    "fold-input-scale": ["m = Mul(x, k)", "a = Add(m, k)", "z = Conv(a, w, b)"],
    "fuse-gelu": ["d = Div(x, root)", "e = Erf(d)", "a = Add(e, one)", "p = Mul(x, a)", "z = Mul(p, half)"],
    "merge-moves": [
        "t = Transpose <perm = [0, 2, 3, 1]> (x)",
        "r = Relu(t)",
        "z = Transpose <perm = [0, 3, 1, 2]> (r)",
    ],
    "remove-identity": ["i = Identity(x)", "r = Relu(i)", "j = Identity(r)", "z = Identity(j)"],
}
CUTS = [(name, cut) for name, chain in CHAINS.items() for cut in range(len(chain))]


@pytest.mark.parametrize(("name", "cut"), CUTS, ids=str)
@pytest.mark.parametrize("read", [False, True], ids=["read in the branch", "read at the top too"])
def test_outputs_stay(name: str, cut: int, read: bool) -> None:
    outer, inner = CHAINS[name][:cut], CHAINS[name][cut:]
    last = outer[-1].split(" = ")[0] if outer else "x"
    body = f"""
        {" ".join(outer)}
        {f"other = Exp({last})" if read else ""}
        y = If (flag) <
            then_branch = then () => (float[A, B, C, D] z) {{ {" ".join(inner)} }},
            else_branch = last () => (float[A, B, C, D] minus) {{ minus = Neg(x) }}
        >
    """
    outputs = "float[A, B, C, D] y" + (", float[E, F, G, H] other" if read else "")
    used = {k: v for k, v in CONSTANTS.items() if any(f" {k}," in line or f" {k})" in line for line in CHAINS[name])}
    proto = parse(body, "float[N, 8, 6, 6] x, bool flag", outputs, used)
    state, _ = pipeline.dry_run(proto, target="cpu")
    prepared = models.to_proto(state.graph, state.header)
    for flag in (True, False):
        fed = {"x": normal(2, 8, 6, 6), "flag": np.array(flag)}
        got = run(prepared, fed)
        for output, want in run(proto, fed).items():
            np.testing.assert_allclose(got[output], want, rtol=1e-4, atol=1e-4)
