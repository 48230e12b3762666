"""Recipes: schema, checks with source locations, resolution to a frozen Plan."""
