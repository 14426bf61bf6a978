"""``python -m qdqtool`` is ``qdqtool``."""

from __future__ import annotations

from qdqtool.cli.main import main

main(prog_name="qdqtool")
