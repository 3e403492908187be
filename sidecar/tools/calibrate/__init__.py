"""Measures the coefficients and the capacity of one (model, hardware) pair."""
