"""The version, read by the package, by pyproject.toml and by CMakeLists.txt. Imports nothing."""

__version__ = "0.2.0"
