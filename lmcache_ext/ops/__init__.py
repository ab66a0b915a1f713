"""Compiled loops, each with a plain twin that shares its tests."""
