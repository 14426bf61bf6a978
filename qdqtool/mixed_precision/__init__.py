"""Search for the precision of every layer: sensitivities, an exact assignment under a budget, verified on data."""
