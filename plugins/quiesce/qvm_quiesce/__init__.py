"""Quiescing of physical devices for qvm."""
