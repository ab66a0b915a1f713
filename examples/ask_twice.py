"""Asks a server for the same long prompt twice and says how much of it was not computed again.

    python ask_twice.py [http://localhost:8080]
    kubectl exec -i deploy/qwen-predictor -- python - < examples/ask_twice.py

Standard library only: it also runs inside the server's container.
"""

import json
import sys
import time
import urllib.request

URL = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8080"
PROMPT = " ".join(str(number) for number in range(1, 600))


def post(path: str, body: dict) -> dict:
    """The answer to a request; raises urllib's errors."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def main() -> None:
    with urllib.request.urlopen(f"{URL}/openai/v1/models", timeout=10) as answer:
        name = json.load(answer)["data"][0]["id"]
    for _ in range(2):
        began = time.perf_counter()
        body = {"model": name, "max_tokens": 1, "messages": [{"role": "user", "content": PROMPT}]}
        usage = post("/openai/v1/chat/completions", body)["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        took_ms = 1000 * (time.perf_counter() - began)
        print(f"{name}: {usage['prompt_tokens']} prompt tokens, {cached} from the cache, {took_ms:.0f} ms")


if __name__ == "__main__":
    main()
