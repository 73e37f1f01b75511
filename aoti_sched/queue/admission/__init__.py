"""Admission: the bounds, the gate, shedding, and the errors of rejected jobs."""
