"""Operators of state space recommenders: arrays in, arrays out; each has a plain-JAX form behind a public function."""
