"""Programs: train, evaluate, recommend, benchmark."""

from tim4rec_jax.memory import keep_freed_memory

# Before anything that a program imports starts threads.
keep_freed_memory()
