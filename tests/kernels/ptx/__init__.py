"""An interpreter of PTX: see `program.run`, and `launch.interpret` for JAX functions."""
