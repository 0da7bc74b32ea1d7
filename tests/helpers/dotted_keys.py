"""The keys of a configuration, as they stand on a command line."""


def dotted_keys(tree, prefix=""):
    """The dotted keys of a configuration."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from dotted_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key
