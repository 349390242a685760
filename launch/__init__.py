"""Runs a grid's cells on this machine or a cluster, and manages them until they end."""
