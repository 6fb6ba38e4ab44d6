"""The texts on MLflow's pages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from bim.orchestrator.tracking.descriptions import (
    depth_rows,
    downsample,
    loading_note,
    pages,
    picture,
    registered_name,
    results_table,
    rounded,
    run_address,
    run_pages,
    runs_view,
    summary_line,
    view_address,
)
from bim.orchestrator.tracking.records import DepthRecord
from tests.snapshots import assert_snapshot

METRICS = {
    "knn_top1": 0.91234,
    "knn_top1_se": 0.0149,
    "linear_top1": 0.95,
    "params": 2_691_648.0,
    "gflops": 0.3612,
    "latency_b1_ms": 9.3999,
}


def record(depth: int, metrics: dict[str, float] | None = None, series: str = "") -> DepthRecord:
    return DepthRecord(depth, Path("."), METRICS if metrics is None else metrics, series=series)


def test_variants_are_described_by_what_was_measured() -> None:
    variants = [
        record(6),
        record(12, {"knn_top1": 0.9, "params": 22e6}),
        record(24, {"rankme": 31.26, "params": 1e6}),
        record(6, {"params": 1e6}, series="mae"),
    ]
    texts = [*map(summary_line, variants), results_table(depth_rows(variants))]
    texts.append(results_table(depth_rows(variants[1:2], {"knn_top1": 0.98, "knn_top1_se": 0.007})))
    assert_snapshot("descriptions", "\n".join(texts))


def test_the_table_of_a_large_family_fits_into_a_description() -> None:
    family = [record(depth, series=series) for series in ("", "mae", "random") for depth in range(1, 25)]
    rows = depth_rows(family, {"knn_top1": 0.98})
    assert [row["model"] for row in rows] == [*(f"depth {depth}" for depth in range(1, 25)), "raw pixels"]
    assert len(results_table(depth_rows(family[:49], {"knn_top1": 0.98}))) < 6000
    assert len(depth_rows(family[:49])) == 49


def test_a_baseline_has_its_own_names() -> None:
    assert (record(6).title, record(6).variant) == ("depth 6", "depth6")
    assert (record(6, series="mae").title, record(6, series="mae").variant) == ("mae depth 6", "mae-depth6")
    assert registered_name("photos", 6) == "photos-depth06"


def test_a_long_curve_keeps_its_ends_and_its_order() -> None:
    curve = [(step, float(step)) for step in range(12_345)]
    thin = downsample(curve, 100)
    assert len(thin) == 100
    assert (thin[0], thin[-1]) == (curve[0], curve[-1])
    assert thin == sorted(set(thin))
    assert downsample(curve[:50], 100) == curve[:50]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.9117867759, 0.9118),
        (9.399999999, 9.4),
        (85798656.0, 85798656.0),
        (12345.6, 12346.0),
        (0.0071234, 0.007123),
    ],
)
def test_numbers_are_rounded_to_what_a_table_can_show(value: float, shown: float) -> None:
    assert rounded(value) == shown


def test_the_loading_code_names_the_store_only_if_it_must() -> None:
    assert "set_tracking_uri" not in loading_note("vit-depth06", 3, None)
    code = loading_note("vit-depth06", 3, "http://host:5000")
    assert '"models:/vit-depth06/3"' in code
    assert 'mlflow.set_tracking_uri("http://host:5000")' in code
    compile(code.strip("`"), "note", "exec")


def test_a_pictures_path_is_quoted() -> None:
    assert picture("abc", "pictures/a b.png") == "![a b](get-artifact?path=pictures/a%20b.png&run_uuid=abc)"


def test_equal_weights_have_equal_digests(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    digests = [DepthRecord(2, tmp_path / name, {}).digest() for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_the_saved_view_is_json_within_json() -> None:
    view = json.loads(runs_view(1_700_000_000_000))
    assert view["name"] == "Depth variants"
    columns = json.loads(view["state"])["selectedColumns"]
    assert columns[:3] == ["metrics.`knn_top1`", "metrics.`knn_top1_se`", "tags.`level_with_best`"]
    assert {"metrics.`rankme`", "metrics.`latency_b64_ms`"} <= set(columns)


def test_addresses_open_in_the_mode_for_training_models() -> None:
    addresses = [run_address("1", "abc"), view_address("1"), *re.findall(r"\]\((.*?)\)", pages("1"))]
    links = re.findall(r"\]\((\S*)\)", run_pages("1", "abc", ["block0/loss", "block1/loss"]))
    assert len(links) == 3
    assert all(address.endswith("workflowType=machine_learning") for address in [*addresses, *links])
    assert view_address("1").startswith("#/experiments/1/runs?viewStateShareKey=depth-variants&")
    depths, curves, query = (parse_qs(link.partition("?")[2]) for link in links)
    assert curves == {**depths, "compareRunsMode": ["CHART"]}
    assert json.loads(query["plot_metric_keys"][0]) == ["block0/loss", "block1/loss"]
    assert json.loads(query["runs"][0]) == ["abc"]
