"""Manifests read as text with places: checked, mended, converted and tuned. Nothing here runs a model or a server."""
