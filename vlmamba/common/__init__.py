"""The ground floor: what every room stands on. Imports nothing of vlmamba but `vlmamba.errors`."""
