class Batch(dict):
    """Values by key and by attribute."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__
