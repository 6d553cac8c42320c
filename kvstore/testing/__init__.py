"""Conformance suites: what every tier and every policy must do, for those who write their own."""
