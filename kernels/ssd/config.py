"""Which backend runs `kernels.ssd.ssd` where nobody names one."""

DEFAULT_CHUNK_SIZE = 64


def default_implementation() -> str:
    """Returns the backend for any platform and shape: the chunked plain-JAX form, the only production one so far."""
    return "xla"
