"""What every test file shares: hypothesis profiles, and the instruction sets of this machine."""

import os

import pytest
from hypothesis import HealthCheck, settings

import dcn_np

# They need a GPU, see gpu/hardware.py; a framework, by `make test-frameworks`; a cross compiler, by
# `make test-aarch64`.
NEEDS = {"gpu": "DCN_NP_TEST_GPU", "frameworks": "DCN_NP_TEST_FRAMEWORKS", "aarch64": "DCN_NP_TEST_AARCH64"}
collect_ignore = [folder for folder, variable in NEEDS.items() if not os.environ.get(variable)]

# The isa fixture stays as it is through all examples of a test, so its scope is no problem.
settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=100,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("quick", settings.get_profile("default"), max_examples=20)
settings.register_profile("explore", settings.get_profile("default"), derandomize=False, max_examples=5000)
settings.load_profile("default")


@pytest.fixture(params=dcn_np.available_isas())
def isa(request):
    """Run the test once on each instruction set that this machine has."""
    with dcn_np.use_isa(request.param):
        yield request.param
