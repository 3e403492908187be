"""Useful work: what an engine completes within the SLO, and what it costs."""
