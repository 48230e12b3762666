"""Alarms: signs in the figures of a run that it goes wrong."""
