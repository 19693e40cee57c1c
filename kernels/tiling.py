"""Sizes of tiles, the same for every backend."""


def power_of_two(size: int, least: int = 16) -> int:
    """Returns the smallest power of two that is at least `size` and `least`; tiles have such sides."""
    return max(least, 1 << (size - 1).bit_length())
