"""Exporters: the numbers of a scheduler in the formats of monitoring systems. Each is an extra."""
