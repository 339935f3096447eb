"""Counting, and the page that Prometheus reads; what the frontend counts is in serve/test_frontend.py."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from penstock.metrics import Histogram, IndexMetrics, Metrics, count, render


def test_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    histogram.observe(0.25, times=4)
    assert histogram.counts == [6, 2, 1]
    assert histogram.sum == 15.0


def test_buckets_are_cumulative_on_the_page() -> None:
    metrics = Metrics()
    for value in (0.001, 0.002, 100.0):
        metrics.model("demo").itl_s.observe(value)
    page = render(metrics, {}, (), IndexMetrics(), 0.0).decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    samples = families["penstock_inter_token_latency_seconds"].samples
    buckets = [sample for sample in samples if sample.name.endswith("_bucket")]
    assert [buckets[0].value, buckets[1].value, buckets[-2].value, buckets[-1].value] == [1, 2, 2, 3]
    assert buckets[-1].labels == {"le": "+Inf", "model_name": "demo"}
    assert [sample.value for sample in samples if sample.name.endswith("_count")] == [3]


def test_counts_start_at_one() -> None:
    counts: dict[str, int] = {}
    count(counts, "a")
    count(counts, "a")
    assert counts == {"a": 2}
    assert Metrics().model("demo").finished == {}
