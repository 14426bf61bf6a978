"""``python -m qdqtool`` is ``qdqtool``."""

from __future__ import annotations

from qdqtool.cli import main

main(prog_name="qdqtool")
