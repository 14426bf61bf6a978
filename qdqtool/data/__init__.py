"""Calibration data: whatever the user has, as samples and batches."""
