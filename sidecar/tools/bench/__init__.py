"""Useful work: what an engine completes within the SLO, and what that costs."""
