"""What is quantized on a target and in which format, and Q/DQ nodes put in by that plan."""
