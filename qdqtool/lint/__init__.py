"""A linter of Q/DQ graphs: rules with findings, fixes where they are safe, machine formats and baselines."""
