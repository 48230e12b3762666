"""`mergeopd new`: recipes and teacher cards with comments, made from the files of a project."""
