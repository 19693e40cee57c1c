"""Programs: train, evaluate, recommend, benchmark."""
