"""Decisions: pure functions of facts, `now` and a seed. No clock, no I/O, no logging."""
