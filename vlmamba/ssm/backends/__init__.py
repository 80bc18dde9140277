"""Implementations of the state-space operations; `vlmamba.ssm.registry` names them."""
