"""Running the float model over the data and keeping what was seen, here or on many machines."""
