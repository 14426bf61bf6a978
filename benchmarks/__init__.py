"""Measurements beside other tools on real models; no part of the tests' verdict."""
