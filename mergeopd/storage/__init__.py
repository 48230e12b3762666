"""What a run leaves on disk and can trust later: atomic folders with manifests, single files, metrics."""
