"""Measurements of the tuners and operators: cases as data, one way to measure, rows in a CSV."""
