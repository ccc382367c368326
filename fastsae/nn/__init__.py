"""Placeholder replaced when the folder gets its modules."""
