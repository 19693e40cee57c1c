"""Models trained alike and put side by side: what is compared, its numbers, and the report."""
