"""Exact tangents beside values: see docs/tangents.md."""
