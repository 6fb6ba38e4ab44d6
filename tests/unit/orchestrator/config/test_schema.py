"""The JSON schema for editors is that of the settings; settings survive YAML."""

from __future__ import annotations

import json
from importlib import resources

from hypothesis import given, settings
from hypothesis import strategies as st

from bim.orchestrator.config.cli import load_settings
from bim.orchestrator.config.recipes import parse_value
from bim.orchestrator.config.schema import json_schema
from bim.orchestrator.config.transforms import settings_to_yaml, with_changes
from bim.orchestrator.config.validate import settings_from_mapping

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=50)

CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**40),
        "boundary_noise": st.floats(0, 10),
        "optim.blr": st.floats(1e-12, 1e3),
        "mask.ratio": st.floats(0.01, 0.99)
        | st.lists(st.floats(0.01, 0.99), min_size=2, max_size=2).map(sorted),
        "decoder.dim": st.integers(1, 4096) | st.lists(st.integers(1, 4096), min_size=4, max_size=4),
        "tracking.experiment": TEXT.filter(bool),
        "tracking.model_name": st.none() | TEXT.filter(bool),
        "backbone.model_args": st.dictionaries(
            st.text("abc_.:# \u00e9", min_size=1),
            st.none() | st.booleans() | st.integers(-(2**17), 2**17) | st.floats(-1e5, 1e5) | TEXT,
        ),
    },
)


def test_the_schema_for_editors_is_that_of_the_settings() -> None:
    """Rewrite it with: python -c "import json; from bim.orchestrator.config.schema import json_schema; ..."""
    text = resources.files("bim.orchestrator.config").joinpath("settings.schema.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(json_schema()))


@settings(max_examples=60, deadline=None)
@given(CHANGES)
def test_settings_written_as_yaml_and_read_back_are_equal(changes: dict[str, object]) -> None:
    changed = with_changes(load_settings([]), changes)
    assert settings_from_mapping(parse_value(settings_to_yaml(changed))) == changed
