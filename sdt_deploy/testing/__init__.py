"""Test kit: an engine made of the reference model, for our tests and for those of embedders."""

from sdt_deploy.testing.oracle import (
    OracleBackend,
    OracleDeviceBackend,
    StageCall,
    memory_bundle,
)

__all__ = ["OracleBackend", "OracleDeviceBackend", "StageCall", "memory_bundle"]
