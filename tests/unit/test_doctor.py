"""What the doctor says of servers in every condition: real HTTP, recorded shapes of /metrics and /lmcache/v1/."""

from __future__ import annotations

import json

import pytest

from lmcache_ext import cli
from lmcache_ext.doctor.condition import findings
from lmcache_ext.doctor.peers import differences
from lmcache_ext.doctor.server import CONFIG, Facts, gather
from lmcache_ext.exposition import read_samples
from tests.answering import HEALTHY, LABELS, SETTINGS, SHOWN, TOLD, answering, saying


@pytest.fixture
def serve():
    with answering() as start:
        yield start


def facts(metrics=HEALTHY, config=SHOWN, **more):
    return Facts("http://a", 200, config, read_samples(metrics), **more)


def said(found, level):
    return [finding.what for finding in found if finding.level == level]


def problems(**options):
    return said(findings(facts(**options)), "problem")


def notes(**options):
    return said(findings(facts(**options)), "note")


class TestHealthy:
    def test_server_has_no_problem_and_says_its_share_of_hits(self):
        assert problems() == []
        assert said(findings(facts()), "ok") == [
            "the cache is on",
            "1536 of 4000 prompt tokens came from the cache (38.4%), in 4 requests",
        ]


class TestOwnPrefixCache:
    OWN = f"vllm:prefix_cache_hits_total{{{LABELS}}} 2304.0\n"

    def test_tokens_that_never_left_the_engine_are_no_misses(self):
        metrics = HEALTHY.replace("1024.0", "0.0").replace("512.0", "0.0") + self.OWN
        assert said(findings(facts(metrics=metrics)), "ok")[1:] == [
            "0 of 4000 prompt tokens came from the cache (0.0%), in 4 requests",
            "2304 tokens were vLLM's own prefix cache (GPU/CPU pool), so nothing had to be loaded",
        ]
        assert notes(metrics=metrics) == []

    def test_are_named_beside_those_that_were_loaded(self):
        assert "2304 tokens were vLLM's own" in said(findings(facts(metrics=HEALTHY + self.OWN)), "ok")[2]


class TestFreshServer:
    def test_whose_metrics_have_no_samples_yet_has_its_cache_on(self):
        metrics = "# HELP lmcache_ext:cache_active 1.\n# TYPE lmcache_ext:cache_active gauge\n"
        assert problems(metrics=metrics) == []
        assert notes(metrics=metrics) == ["no request has been looked up since the start"]


class TestProblem:
    def test_no_metrics(self):
        assert problems(metrics="", config={}) == ["there is no /metrics"]

    def test_cache_that_was_never_switched_on(self):
        assert problems(metrics="vllm:num_requests_running 0\n", config={}) == [
            "the cache is off: /metrics has nothing of it"
        ]

    def test_cache_that_turned_itself_off(self):
        assert (
            "turned itself off"
            in problems(metrics=HEALTHY.replace("cache_active{" + LABELS + "} 1", "cache_active 0"))[0]
        )

    @pytest.mark.parametrize("mode", ["bypass", "freeze"])
    def test_mode_that_somebody_set(self, mode):
        settings = SETTINGS | {mode: {"value": "true", "origin": "/lmcache/c.yaml:3", "live": True}}
        (problem,) = problems(config=SHOWN | {"settings": settings})
        assert problem.startswith(f"{mode} is true (/lmcache/c.yaml:3)")

    def test_file_that_is_not_in_effect(self):
        refusal = {"reasons": ["/lmcache/c.yaml:1: chunk_size: 256 -> 128 needs a restart"]}
        (problem,) = problems(config=SHOWN | {"in_effect": False, "last_refusal": refusal})
        assert "256 -> 128 needs a restart" in problem

    def test_hash_that_differs_in_every_process(self):
        assert "xxhash_cbor" in problems(metrics=HEALTHY.replace("sha256_cbor", "xxhash_cbor"))[0]

    def test_prefix_caching_that_is_off(self):
        metrics = HEALTHY.replace('enable_prefix_caching="True"', 'enable_prefix_caching="False"')
        assert problems(metrics=metrics) == ["vLLM's prefix caching is off"]

    def test_prompts_shorter_than_a_chunk(self):
        (problem,) = problems(metrics=HEALTHY.replace("4000.0", "400.0"))
        assert "100 tokens on average, and a chunk has 256" in problem

    def test_breaker_that_is_open_with_what_opened_it(self):
        down = (
            'lmcache_ext:tier_up{tier="redis"} 0\nlmcache_ext:store_failures_total{tier="redis",cause="read.slow"} 5\n'
        )
        assert problems(metrics=HEALTHY + down) == ["redis: its circuit breaker is open (failures so far: read.slow)"]

    def test_chunks_that_were_wrong(self):
        wrong = 'lmcache_ext:corrupt_chunks_total{tier="disk",cause="ChecksumMismatch"} 2\n'
        assert problems(metrics=HEALTHY + wrong) == ["disk: 2 stored chunks were wrong: ChecksumMismatch"]

    def test_request_that_was_explained(self):
        (problem,) = problems(explain_status=200, explanation=TOLD)
        assert problem == "this request: tokens up to 64 are known: ...'once upon' | ' a time'..."


class TestNote:
    def test_no_traffic(self):
        metrics = "\n".join(line for line in HEALTHY.splitlines() if not line.startswith("lmcache:"))
        assert notes(metrics=metrics) == ["no request has been looked up since the start"]

    def test_engine_that_has_not_taken_the_file(self):
        (note,) = notes(config=SHOWN | {"engines": {"1": {"digest": "bbbbbbbb"}, "0": {"digest": "aaaaaaaa"}}})
        assert note == "engine 1 runs file bbbbbbbb, and the file is aaaaaaaa"

    def test_tier_that_is_full(self):
        names = ("lmcache_ext:tier_used_bytes", "lmcache_ext:tier_capacity_bytes")
        full = "".join(f'{name}{{tier="disk"}} 1073741824\n' for name in names)
        assert "disk is full (1.0 GiB of 1.0 GiB)" in notes(metrics=HEALTHY + full)[0]

    def test_chunks_that_were_not_written(self):
        dropped = 'lmcache_ext:dropped_chunks_total{tier="disk",cause="StoreFull"} 3\n'
        assert notes(metrics=HEALTHY + dropped) == ["disk: 3 chunks were not written: StoreFull"]

    def test_tenant_that_its_quota_has_cost_chunks(self):
        labels = '{tier="host",tenant="team-a"}'
        metrics = f"lmcache_ext:tenant_quota_bytes{labels} 2097152\nlmcache_ext:tenant_evicted_chunks_total{labels} 7\n"
        (note,) = notes(metrics=HEALTHY + metrics)
        assert note == "tenant team-a: 7 chunks made way for newer ones of its own, for its quota, which is 2.0 MiB"
        (note,) = notes(metrics=HEALTHY + metrics.replace("2097152", "+Inf"))  # since then it has no quota any more
        assert note == "tenant team-a: 7 chunks made way for newer ones of its own, for its quota"
        (note,) = notes(metrics=HEALTHY + f"lmcache_ext:tenant_rejected_chunks_total{labels} 3\n")
        assert note == "tenant team-a: 3 chunks were not kept, for its quota"

    def test_request_with_a_salt(self):
        (note,) = notes(explain_status=200, explanation=TOLD | {"salted": True})
        assert note == "this request has a cache_salt, which is part of every key"

    def test_request_that_nobody_explains(self):
        (note,) = notes(explain_status=404, explanation={"error": "is off"})
        assert note == "this request could not be explained: is off"


class TestTwoServers:
    def pair(self, **changed):
        other = Facts("http://b", explanation=TOLD | {"components": TOLD["components"] | changed})
        return list(differences(facts(explanation=TOLD), other))

    def test_of_one_namespace_share(self):
        assert said(self.pair(), "ok") == ["http://a and http://b have one namespace: 00ff"]

    def test_of_other_weights_never_share_and_the_component_is_named(self):
        assert said(self.pair(weights="w2"), "problem") == [
            "http://a and http://b never share: weights differs: w1 and w2"
        ]

    def test_of_another_seed_are_told_of_the_variable(self):
        ours, theirs = f"sha256_cbor/{'a' * 64}", f"sha256_cbor/{'b' * 64}"
        first = facts(explanation=TOLD | {"components": {"hash": ours}})
        (finding,) = differences(first, Facts("http://b", explanation=TOLD | {"components": {"hash": theirs}}))
        assert finding.what.startswith("http://a and http://b never share: hash differs: sha256_cbor/aaaa")
        assert "give PYTHONHASHSEED the same value on both" in finding.way_out

    def test_of_another_algorithm_are_told_of_the_flag(self):
        (finding,) = self.pair(hash="sha256/python3.12.1/00")
        assert "--prefix-caching-hash-algo" in finding.way_out

    def test_of_other_chunks_see_both_and_the_setting(self):
        first = facts(explanation=TOLD | {"components": {"chunk": "blocks=2 row=4096"}})
        other = Facts("http://b", explanation=TOLD | {"components": {"chunk": "blocks=1 row=2048"}})
        (finding,) = differences(first, other)
        assert "chunk differs: blocks=2 row=4096 and blocks=1 row=2048" in finding.what
        assert "chunk_size" in finding.way_out

    def test_of_another_model_see_which_settings_of_it_differ(self):
        def model(**changed):
            settings = {f"key{number}": number for number in range(100)} | changed
            return {"model": f"['LlamaForCausalLM']/None/{json.dumps(settings, sort_keys=True)}"}

        first = facts(explanation=TOLD | {"components": model()})
        other = Facts("http://b", explanation=TOLD | {"components": model(key7=70, rope_theta=5e5)})
        (finding,) = differences(first, other)
        assert finding.what.endswith("model differs: key7 is 7 and 70, rope_theta is null and 500000.0")

    def test_long_texts_are_shown_where_they_differ(self):
        first = facts(explanation=TOLD | {"components": {"groups": "x" * 5000 + "ours" + "y" * 5000}})
        other = Facts("http://b", explanation=TOLD | {"components": {"groups": "x" * 5000 + "hers" + "y" * 5000}})
        (finding,) = differences(first, other)
        assert "xxours" in finding.what
        assert "xxhers" in finding.what
        assert len(finding.what) < 250

    def test_component_that_only_one_has(self):
        assert said(self.pair(loss="cachegen"), "problem") == [
            "http://a and http://b never share: loss differs: nothing and cachegen"
        ]

    def test_that_do_not_explain_are_compared_by_what_they_show(self):
        settings = SETTINGS | {"chunk_size": {"value": "128", "origin": "default", "live": False}}
        other = Facts("http://b", 200, SHOWN | {"settings": settings}, read_samples(HEALTHY))
        found = list(differences(facts(), other))
        assert said(found, "problem") == ["http://a and http://b never share: chunk_size differs: 256 and 128"]
        assert said(found, "note") == [
            "http://a and http://b did not explain: of what is shown, "
            "chunk_size, block_size, prefix_caching_hash_algo were compared"
        ]

    def test_that_show_nothing_cannot_be_compared(self):
        (note,) = differences(Facts("http://a"), Facts("http://b"))
        assert "nothing that they show could be compared" in note.what


class TestAsking:
    def test_reads_everything_over_http(self, serve):
        server = serve()
        found = gather(server.url + "/", request={"prompt": "p"})
        assert found.setting("chunk_size") == "256"
        assert found.total("lmcache:num_hit_tokens_total") == 1536
        assert found.total("lmcache:num_hit_tokens_total", tier="disk") == 512
        assert found.explanation == TOLD
        assert server.requests == [{"prompt": "p"}]

    def test_without_the_key_says_that_one_is_needed(self, serve):
        server = serve(key="secret")
        assert f"{CONFIG}: needs the server's API key" in said(findings(gather(server.url)), "note")
        assert gather(server.url, api_key="secret").setting("chunk_size") == "256"

    def test_nothing_but_servers(self, tmp_path):
        with pytest.raises(ValueError, match="http://host:8080"):
            gather(f"file://{tmp_path}")


class TestCommand:
    def test_is_0_for_a_healthy_server(self, serve, capsys):
        assert cli.main(["doctor", serve().url]) == 0
        assert "ok: the cache is on" in capsys.readouterr().out

    def test_is_1_with_a_problem_and_its_way_out(self, serve, capsys, tmp_path):
        (tmp_path / "key").write_text("secret\n")
        (tmp_path / "body.json").write_text('{"messages": []}')
        server = serve(key="secret")
        command = [
            "doctor",
            server.url,
            "--api-key-file",
            str(tmp_path / "key"),
            "--request",
            str(tmp_path / "body.json"),
        ]
        assert cli.main(command) == 1
        assert "problem: this request: tokens up to 64 are known" in capsys.readouterr().out
        assert server.requests == [{"messages": []}]

    def test_compares_several(self, serve, capsys):
        other = TOLD | {"components": {"weights": "w2", "hash": "h"}}
        assert cli.main(["doctor", serve().url, serve(explanation=other).url]) == 1
        out = capsys.readouterr().out
        assert "weights differs: w1 and w2" in out
        assert "this request" not in out

    def test_compares_a_peer(self, serve, capsys):
        other = TOLD | {"components": {"weights": "w2", "hash": "h"}}
        assert cli.main(["doctor", serve().url, "--peer", serve(explanation=other).url]) == 1
        assert "weights differs: w1 and w2" in capsys.readouterr().out

    def test_peer_that_is_gone_is_named_and_the_others_are_told_of(self, serve, capsys):
        assert cli.main(["doctor", serve().url, "http://127.0.0.1:1", "--peer", serve().url]) == 1
        out = capsys.readouterr().out
        assert "problem: http://127.0.0.1:1 does not answer: " in out
        assert "have one namespace" in out

    def test_says_which_remote_was_not_asked(self, serve, capsys):
        remote = {"value": "redis://u:***@redis:6379", "origin": "/lmcache/c.yaml:2", "live": True}
        assert cli.main(["doctor", serve(config=SHOWN | {"settings": SETTINGS | {"remote_url": remote}}).url]) == 0
        assert "its remote_url, redis://u:***@redis:6379, was not asked" in capsys.readouterr().out

    @pytest.mark.parametrize("banner", [b"-ERR unknown command 'GET'\r\n", b""])
    def test_server_that_speaks_something_else_is_named(self, banner, capsys):
        with saying(banner) as url:
            assert cli.main(["doctor", url]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert said[0].startswith(f"{url} does not answer: ")

    @pytest.mark.parametrize(
        "arguments", [["http://127.0.0.1:1"], ["localhost:8080"], ["http://h", "--request", "/no"]]
    )
    def test_is_2_where_nobody_can_be_asked(self, arguments, capsys):
        assert cli.main(["doctor", *arguments]) == 2
        assert capsys.readouterr().err
