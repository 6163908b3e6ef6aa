"""Figures of what `eval`, `bench` and `calibrate` found, as SVG or PNG; matplotlib draws them.

matplotlib is an extra, and nothing here is imported before `check_plot` has seen it.
"""
