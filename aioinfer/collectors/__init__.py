"""Collect experience: many environments, stepped in groups, ask one served policy."""
