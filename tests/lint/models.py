"""A small Q/DQ model that every rule is content with, and what is changed in it to break one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from qdqtool.lint import linting, subject
from qdqtool.lint.findings import Checked, Finding
from qdqtool.planning.target import TARGETS
from tests.builders import Array, parse

BODY = """
xq = QuantizeLinear(x, xs, xz)
xd = DequantizeLinear(xq, xs, xz)
wd = DequantizeLinear <axis = 0> (wq, ws, wz)
bd = DequantizeLinear <axis = 0> (bq, bs, bz)
[conv] c = Conv <pads = [1, 1, 1, 1]> (xd, wd, bd)
[relu] r = Relu(c)
[out_q] rq = QuantizeLinear(r, rs, rz)
[out_dq] y = DequantizeLinear(rq, rs, rz)
"""
SHAPE = "float[N, 8, 6, 6]"


def values() -> dict[str, Array]:
    """Scales, zero points and codes of one convolution of 8 channels."""
    rng = np.random.default_rng(0)
    ws = rng.uniform(0.002, 0.004, 8).astype(np.float32)
    xs = np.float32(2 / 255)
    return {
        "xs": np.array(xs), "xz": np.array(128, np.uint8),
        "ws": ws, "wz": np.zeros(8, np.int8), "wq": rng.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8),
        "bs": xs * ws, "bz": np.zeros(8, np.int32), "bq": rng.integers(-9000, 9000, 8).astype(np.int32),
        "rs": np.array(0.02, np.float32), "rz": np.array(0, np.uint8),
    }  # fmt: skip


def model(
    changes: Mapping[str, Array] | None = None,
    texts: Mapping[str, str] | None = None,
    *,
    opset: int = 17,
    domain: str = "",
) -> onnx.ModelProto:
    """The intact model with other constants and other lines; every text that is replaced must be there."""
    body = BODY
    for old, new in (texts or {}).items():
        assert old in body
        body = body.replace(old, new)
    output = SHAPE.replace("float", "uint8") if "uint8" in body else SHAPE
    return parse(body, f"{SHAPE} x", f"{output} y", {**values(), **(changes or {})}, opset=opset, domain=domain)


def checked(proto: onnx.ModelProto, target: str | None = "cpu") -> Checked:
    """The model under all rules."""
    return linting.check(subject.load(proto), None if target is None else TARGETS[target])


def found(proto: onnx.ModelProto, target: str | None = "cpu") -> dict[str, list[Finding]]:
    """Findings by rule."""
    by_rule: dict[str, list[Finding]] = {}
    for finding in checked(proto, target).findings:
        by_rule.setdefault(finding.rule, []).append(finding)
    return by_rule


def sample(seed: int = 0) -> dict[str, Any]:
    """Inputs of the model."""
    return {"x": np.random.default_rng(seed).uniform(-1, 1, (4, 8, 6, 6)).astype(np.float32)}
