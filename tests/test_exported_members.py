"""`octavo.__all__` is the public API: complete, sorted, and not overshadowed by the modules behind it."""

from __future__ import annotations

import importlib
import pkgutil
import types

import octavo


def test_all_is_sorted_and_free_of_repeats() -> None:
    assert list(octavo.__all__) == sorted(set(octavo.__all__))


def test_all_is_what_the_package_shows() -> None:
    shown = {name for name in dir(octavo) if not name.startswith("_")}
    hidden = {name for name in shown if isinstance(getattr(octavo, name), types.ModuleType)}
    # `from __future__ import annotations` leaves a name behind.
    assert shown - hidden - {"annotations"} == {name for name in octavo.__all__ if not name.startswith("_")}


def test_every_name_is_there_and_is_not_a_module() -> None:
    # A file of octavo/ that had the name of a function would take its place when it is imported.
    for module in pkgutil.iter_modules(octavo.__path__, "octavo."):
        if module.name != "octavo.__main__":
            importlib.import_module(module.name)
    for name in octavo.__all__:
        assert not isinstance(getattr(octavo, name), types.ModuleType), name


def test_the_version_is_one_that_pip_understands() -> None:
    major, minor, patch = octavo.__version__.split(".")
    assert (major + minor + patch).isdigit()
