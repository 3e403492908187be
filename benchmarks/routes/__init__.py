"""Routes from a client to an engine, for relay.py and loop_hold.py: both ends, what stands between, and its cost."""
