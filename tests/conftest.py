"""What several test files share."""

import json
import os
import shutil

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch starts: see lfm_edge/cli.py

import pytest
from hypothesis import HealthCheck, settings

from tests.client_helpers import tasks
from tests.helpers import TINY

# The same examples on every run, and no verdict that depends on how busy the machine is.
settings.register_profile("steady", derandomize=True, deadline=None, database=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Packed graphs stay out of the user's cache, in the processes that tests start as well."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """The trained toy checkpoint as an `android-q4` bundle. Read-only: copy its directory to change something."""
    from lfm_edge import export

    return export(TINY, target="android-q4", output=tmp_path_factory.mktemp("tiny") / "bundle", context=1024)


@pytest.fixture(scope="session")
def few_tasks(tmp_path_factory):
    """The trained toy checkpoint with two prompts of each of its tasks, for runtimes that are slow here."""
    copy = shutil.copytree(TINY, tmp_path_factory.mktemp("few-tasks") / "checkpoint")
    (copy / "tasks.json").write_text(json.dumps(tasks(each=2)))
    return copy
