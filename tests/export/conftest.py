import pytest

from support.models import exported_models


@pytest.fixture(scope="module", autouse=True)
def plain_models(tmp_path_factory):
    exported_models.add_configs(tmp_path_factory.mktemp("configs"))
