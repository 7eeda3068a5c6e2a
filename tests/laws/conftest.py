"""One workshop of sound programs for all laws."""

from __future__ import annotations

import pytest
from harness.programs import Workshop


@pytest.fixture(scope="session")
def workshop() -> Workshop:
    """Sound programs, built once per process."""
    return Workshop()
