"""Local functions of a model (FunctionProto): inlined when it is loaded, so that passes see the operators in them."""

from __future__ import annotations

import onnx
import onnx.inliner

from qdqtool.errors import ModelError


def inline(proto: onnx.ModelProto) -> None:
    """Put the nodes of local functions, nested ones too, in the place of the nodes that call them; in place.

    Values of initializers are not copied meanwhile: the calls alone matter.

    Raises:
        ModelError: a function cannot be inlined, for instance as it calls itself.
    """
    if not proto.functions:
        return
    bare = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    bare.graph.name = proto.graph.name
    bare.graph.node.extend(proto.graph.node)
    bare.graph.input.extend(proto.graph.input)
    bare.graph.output.extend(proto.graph.output)
    bare.graph.value_info.extend(proto.graph.value_info)
    try:
        flat = onnx.inliner.inline_local_functions(bare, convert_version=True)
    except Exception as error:  # the C++ side raises several unrelated types
        raise ModelError(f"the local functions of the model cannot be inlined: {str(error).strip()}") from error
    for field in ("node", "value_info"):
        proto.graph.ClearField(field)
        getattr(proto.graph, field).extend(getattr(flat.graph, field))
    for field in ("functions", "opset_import"):
        proto.ClearField(field)
        getattr(proto, field).extend(getattr(flat, field))
