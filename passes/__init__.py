"""The library of graph rewrites, written against the same public API that a user's own passes use."""
