"""Shapes, inputs, comparison and the op battery, shared by ``tests/`` and ``benchmarks/`` so that they cannot drift apart."""
