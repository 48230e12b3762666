"""YAML with source locations: parsing, `extends`, variables, overrides and validation errors.

Independent of any recipe key.
"""
