"""A trained run as a service over HTTP, see `experiments.serve.__main__`."""
