"""Which steps are of no concern to the cache: most of those that decode.

In each step vLLM's scheduler of transfers goes through every request, tier and cache group, to find in nearly all of
them that there is nothing to do. That takes 20 us with one request and more with many, of steps of a few
milliseconds. So it is left out of steps of which is known beforehand that it would find nothing:

* every request only goes on, by one token, in the blocks that it has: none comes, ends, is preempted or resumed;
* none of them fills a chunk that would be stored;
* nothing was looked up, planned or reported since it last ran, no tier has news, and no setting has changed.

What it does is the sum of what has changed since it last ran, so a step left out too many delays a store and loses
nothing; a request that ends, and a block that is given to another, are never left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache_ext.offload.progress import Progress

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
    from vllm.v1.core.sched.output import SchedulerOutput

_LONGEST = 64  # steps in a row; the bound on what a step that should not have been left out would delay


class QuietSteps:
    """Tells which steps can be left out. Runs in the scheduler's thread.

    `wake` before anything happens that the next step must not leave out; `plans` after each step that was not.
    """

    def __init__(self, scheduler: OffloadingConnectorScheduler, progress: Progress) -> None:
        self._scheduler = scheduler
        self._progress = progress
        self._awake = True
        self._seen = 0  # progress when news were taken in last: what came later is still to be
        self._left = 0
        self._planned: dict[str, int] = {}

    def wake(self) -> None:
        """The next step is not left out."""
        if not self._awake:
            self._awake, self._seen = True, self._progress.count

    def holds(self, output: SchedulerOutput) -> bool:
        """Whether this step is left out."""
        if self._awake:
            return False
        known = output.num_scheduled_tokens.keys() <= self._planned.keys()
        if not self._left or not known or self._progress.count != self._seen or not _only_goes_on(output):
            self.wake()
            return False
        self._left -= 1
        return True

    def plans(self, output: SchedulerOutput) -> None:
        """A step was not left out; count how many after it can be, if nothing happens."""
        self._awake, self._left, self._planned = False, self._num_quiet(output), output.num_scheduled_tokens

    def _num_quiet(self, output: SchedulerOutput) -> int:
        """How many times each request can go on by a token before one of them fills a chunk that would be stored."""
        scheduler, config = self._scheduler, self._scheduler.config
        left = _LONGEST
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            status = scheduler._req_status.get(req_id)
            if status is None:
                continue
            num_computed = status.req.num_computed_tokens + num_tokens
            if config.offload_prompt_only and num_computed >= status.req.num_prompt_tokens:
                continue
            num_stored = scheduler._calc_num_offloadable_tokens(status, num_computed)
            for group in config.kv_group_configs:
                left = min(left, group.tokens_per_chunk - num_stored % group.tokens_per_chunk - 1)
        return left


def _only_goes_on(output: SchedulerOutput) -> bool:
    """Whether each request that is scheduled gets one token more, and no block, and none comes or goes."""
    going_on, state = output.scheduled_cached_reqs, output.kv_connector_block_state
    return not (
        output.total_num_scheduled_tokens != len(output.num_scheduled_tokens)
        or not output.num_scheduled_tokens
        or output.scheduled_new_reqs
        or output.finished_req_ids
        or output.preempted_req_ids
        or going_on.resumed_req_ids
        or any(going_on.new_block_ids)
        or output.kv_cache_block_copies
        or (state is not None and state.boundary_state_offloads)
    )
