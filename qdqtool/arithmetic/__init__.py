"""Codes, scales and rounding: the numbers of quantization."""
