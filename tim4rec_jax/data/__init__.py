"""Interaction logs: from files to batches."""
