"""Find the layers at which a quantized model errs, and put them back by the cheapest means that works."""
