"""HTTP servers of inference engines: start them and talk to them. Nothing here imports torch."""
