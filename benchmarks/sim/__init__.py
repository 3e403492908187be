"""The verdict simulator: an engine model, its faults, the field's detectors, and engine-weeks made of them."""
