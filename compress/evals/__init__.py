"""Measurements on emitted directories."""
