"""Run generated Python programs in isolated processes. Standard library only, below all other packages."""
