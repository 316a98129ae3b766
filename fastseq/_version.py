"""The version, read by the package, by pyproject.toml and by CMakeLists.txt. Imports nothing."""

__version__ = "0.1.0"
