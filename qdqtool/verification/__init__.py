"""What became of the quantized model: accuracy, placement and latency on the real runtime."""
