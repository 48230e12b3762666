"""Located YAML: parsing, `extends`, variables, overrides, validation errors in words. Knows no recipe key."""
