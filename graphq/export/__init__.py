"""Files that runtimes read."""
