"""Many devices and processes: the mesh, the item table in shards on it, and what processes agree on."""
