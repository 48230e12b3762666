"""Pairs of a student and a teacher with a known defect, for tools/inspect_trials.py."""
