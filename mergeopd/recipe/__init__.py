"""The declarative recipe: schema, loading with located errors, resolution to a frozen Plan."""
