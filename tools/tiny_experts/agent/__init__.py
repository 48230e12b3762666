"""Experts of five kinds: math, code, search, tools and chat. Two of them call tools.

Apart from its parent's modules, so that a change here leaves the other sets valid.
"""
