"""Run folders on disk: atomic folders with manifests, single files, metrics, locks."""
