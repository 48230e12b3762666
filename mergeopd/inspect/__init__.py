"""Reports about models and recipes, made without training."""
