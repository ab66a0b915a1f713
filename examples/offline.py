"""Asks about one document without a server. Run it twice: the second process starts from what the first computed.

    export LMCACHE_LOCAL_DISK=/tmp/kv    # or LMCACHE_REMOTE_URL, or LMCACHE_CONFIG_FILE
    python offline.py MODEL [QUESTION...]

A script written for LMCache needs two changes: nothing is imported from `lmcache`, and instead of
`LMCacheEngineBuilder.destroy` the engine is given a `shutdown_timeout`, within which it writes what is not yet stored.
"""

import sys

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

DOCUMENT = " ".join(str(number) for number in range(1, 600))


def main() -> None:
    questions = sys.argv[2:] or ["What comes next?", "What came first?"]
    sampling = SamplingParams(temperature=0, max_tokens=8)
    llm = LLM(
        model=sys.argv[1],
        kv_transfer_config=KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both"),
        shutdown_timeout=30,
        enforce_eager=True,
    )
    for question in questions:
        (answer,) = llm.generate([f"{DOCUMENT}. {question}"], sampling, use_tqdm=False)
        print(f"{len(answer.prompt_token_ids)} prompt tokens, {answer.num_cached_tokens} from the cache")


if __name__ == "__main__":  # vLLM starts its workers anew from this file
    main()
