"""A registry of named things that other packages can add to through an entry point group."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from graphq.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names → things of one kind; an unknown name is looked for in the entry points of `group` first."""

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a thing under a name."""

        def add(item: T) -> T:
            self._items[name] = item
            return item

        return add

    def names(self) -> list[str]:
        return sorted({*self._items, *(e.name for e in entry_points(group=self.group))})

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            for entry in entry_points(group=self.group, name=name):
                self._items[name] = entry.load()
        if name not in self._items:
            raise ConfigError(f"unknown {self.kind} {name!r}", remedy=did_you_mean(name, self.names()))
        return self._items[name]
