"""Environments: the tools that a model calls during a response of several turns."""
