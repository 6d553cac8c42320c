"""Connectors between the store and engines. Importing this package imports no engine."""
