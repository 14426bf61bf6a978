"""The float graph: reading, walking, matching and rewriting it, and what its layers are."""
