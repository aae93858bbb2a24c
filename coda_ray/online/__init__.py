"""Plates as they arrive: what is new, what was done, how far it is from what is known, and which model serves it."""
