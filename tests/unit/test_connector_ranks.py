"""What several workers report is one report."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from lmcache_ext.offload.messages import LMCacheWorkerMetadata


def test_a_failed_load_of_one_rank_fails_the_request_once_both_have_reported():
    aggregator = KVOutputAggregator(expected_finished_count=2)
    failed = LMCacheWorkerMetadata({5: 1}, failed_jobs={5})
    outputs = [
        [KVConnectorOutput(finished_recving={"r"}, failed_recving={"r"}, kv_connector_worker_meta=failed), None],
        [None, KVConnectorOutput(finished_recving={"r"}, kv_connector_worker_meta=LMCacheWorkerMetadata({5: 1}))],
    ]
    reports = []
    for ranks in outputs:
        results = [ModelRunnerOutput(req_ids=[], req_id_to_index={}, kv_connector_output=out) for out in ranks]
        reports.append(aggregator.aggregate(results).kv_connector_output)
    assert [report.failed_recving for report in reports] == [set(), {"r"}]
    assert [report.finished_recving for report in reports] == [None, {"r"}]


def test_metadata_of_ranks_adds_completions_and_joins_failures():
    first = LMCacheWorkerMetadata({1: 1, 2: 1}, failed_jobs={1})
    second = LMCacheWorkerMetadata({2: 1, 3: 1}, failed_jobs={3})
    both = first.aggregate(second)
    assert isinstance(both, LMCacheWorkerMetadata)
    assert both.completed_jobs == {1: 1, 2: 2, 3: 1}
    assert both.failed_jobs == {1, 3}
