"""Measurements of cost, kept apart from the tests: they never assert a time."""
