"""What the doctor says of backends: real servers, in every condition in which they give no hits."""

from __future__ import annotations

import os
import time

import pytest

from lmcache_ext import cli
from lmcache_ext.config import load_config
from lmcache_ext.doctor import backends
from lmcache_ext.doctor.backends import findings, gather
from lmcache_ext.errors import ConfigError
from lmcache_ext.stores.base import Survey, Usage
from lmcache_ext.stores.options import store_options
from lmcache_ext.stores.registry import open_store
from tests import mooncake_servers, servers
from tests.answering import answering
from tests.contracts.store_contract import NAMESPACE, OTHER_NAMESPACE, key_of, views
from tests.lm_servers import OldClient, OldServer, serving

OURS, THEIRS = NAMESPACE.hex(), OTHER_NAMESPACE.hex()
PASSWORD = "s3cret-of-redis"
LARGE = 7 * 1024**2  # in parts, which are no objects


def options(url, **extra):
    return store_options(url, load_config(environ={})) | extra


def fill(url, *keys, num_bytes=100, **extra):
    store = open_store(url, options=options(url, **extra))
    for key in keys:
        store.put(key, views(bytes(num_bytes)))
    store.close()


def told(url, namespace=OURS, **extra):
    """Level and text of each finding about a backend."""
    surveys = gather(url, options(url, **extra))
    found = [one for survey in surveys for one in findings(survey, namespace=namespace, lookup_timeout_s=0.3)]
    return [(finding.level, finding.what) for finding in found]


def said(found, level):
    return " | ".join(what for its, what in found if its == level)


@pytest.fixture
def serve():
    with answering() as start:
        yield start


def url_of(server, scheme="redis", rest=""):
    return f"{scheme}://{server.address}{rest}"


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with servers.server("redis", tmp_path_factory.mktemp("redis")) as one:
        yield one


@pytest.fixture
def empty(redis):
    servers.command(redis.port, "FLUSHALL")
    servers.command(redis.port, "CONFIG", "SET", "maxmemory", "0")
    servers.command(redis.port, "CONFIG", "SET", "maxmemory-policy", "noeviction")
    yield redis
    servers.command(redis.port, "CONFIG", "SET", "maxmemory", "0")


class TestRedis:
    def test_that_holds_chunks_of_this_namespace(self, empty):
        fill(url_of(empty), key_of("a"), key_of("b"), key_of("a", OTHER_NAMESPACE))
        found = told(url_of(empty))
        assert f"holds 2 chunks of this namespace, and of {THEIRS} (1 chunks)" in said(found, "ok")
        assert f"redis {empty.address} answers in 0." in said(found, "ok")
        assert not said(found, "problem")

    def test_that_holds_only_those_of_another(self, empty):
        fill(url_of(empty), key_of("a", OTHER_NAMESPACE))
        problem = said(told(url_of(empty)), "problem")
        assert f"holds no chunk of this namespace ({OURS}), only of {THEIRS} (1 chunks)" in problem

    def test_that_holds_none(self, empty):
        servers.command(empty.port, "SET", "session:1", "somebody else's")
        found = told(url_of(empty))
        assert "holds no chunk at all" in said(found, "note")
        assert not said(found, "problem")

    def test_where_nobody_knows_which_namespace_is_ours(self, empty):
        fill(url_of(empty), key_of("a"))
        assert f"{OURS} (1 chunks); which is ours is not known" in said(told(url_of(empty), namespace=""), "note")

    def test_counts_objects_and_not_their_parts(self, empty):
        fill(url_of(empty), key_of("long"), num_bytes=LARGE)
        assert "holds 1 chunks of this namespace" in said(told(url_of(empty)), "ok")

    def test_without_a_limit(self, empty):
        assert "has no limit" in said(told(url_of(empty)), "note")

    def test_that_evicts(self, empty):
        servers.command(empty.port, "CONFIG", "SET", "maxmemory", "1gb")
        servers.command(empty.port, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        assert "of 1.0 GiB; when it is full: allkeys-lru" in said(told(url_of(empty)), "ok")

    def test_that_is_full_and_refuses_what_is_new(self, empty):
        fill(url_of(empty), key_of("long"), num_bytes=LARGE)
        servers.command(empty.port, "CONFIG", "SET", "maxmemory", "7mb")
        assert "noeviction: it is full, and refuses what is new" in said(told(url_of(empty)), "problem")

    def test_many_keys_are_all_seen(self, empty):
        script = "for i=1,5000 do redis.call('set', KEYS[1]..string.format('%06x', i), 'x') end"
        servers.command(empty.port, "EVAL", script, 1, f"kv:{OURS}:")
        assert "holds 5000 chunks of this namespace" in said(told(url_of(empty)), "ok")

    def test_whose_user_may_not_look_around(self, empty):
        servers.command(empty.port, "ACL", "SETUSER", "meek", "on", f">{PASSWORD}", "~*", "+get", "+set", "+ping")
        found = told(f"redis://meek:{PASSWORD}@{empty.address}")
        assert "does not say how full it is" in said(found, "note")
        assert "does not say whose chunks it holds" in said(found, "note")
        assert "answers in" in said(found, "ok")


class TestDeadOrClosed:
    def test_password_that_is_wrong_is_named_and_shown_nowhere(self, tmp_path):
        with servers.server("redis", tmp_path, "--requirepass", "another") as one:
            (finding,) = told(f"redis://:{PASSWORD}@{one.address}")
            assert finding[0] == "problem"
            assert f"redis {one.address} lets nobody in with this password" in finding[1]
            assert PASSWORD not in finding[1]
            fill(f"redis://:another@{one.address}", key_of("a"))
            assert "holds 1 chunks" in said(told(url_of(one), password="another"), "ok")

    def test_nobody_listens(self):
        port = servers.free_port()
        (finding,) = told(f"redis://user:{PASSWORD}@127.0.0.1:{port}")
        assert finding[0] == "problem"
        assert f"redis 127.0.0.1:{port} does not answer" in finding[1]
        assert "refused" in finding[1]
        assert PASSWORD not in finding[1]

    def test_a_server_that_hangs_is_given_up(self, tmp_path, monkeypatch):
        monkeypatch.setattr(backends, "PATIENCE_S", 0.5)
        with servers.server("redis", tmp_path) as one:
            one.signal(19)  # SIGSTOP
            started_at = time.monotonic()
            (finding,) = told(url_of(one))
            one.signal(18)
        assert time.monotonic() - started_at < 3
        assert "no answer within 0.5 s" in finding[1]

    @pytest.mark.parametrize(
        "url",
        [
            f"reddis://:{PASSWORD}@h:1",
            f"redis://u:{PASSWORD}@h:99999",
            f"lm://u:{PASSWORD}@h:1",
            f"redis://:{PASSWORD}@h:1?colour={PASSWORD}",
            "nonsense",
        ],
    )
    def test_what_is_no_backend_is_refused_without_its_password(self, url):
        with pytest.raises(ConfigError) as refused:
            gather(url, options("redis://h:1"))
        assert PASSWORD not in str(refused.value)


class TestOthersLikeRedis:
    def test_valkey(self, tmp_path):
        with servers.server("valkey", tmp_path) as one:
            fill(url_of(one, "valkey"), key_of("a"))
            assert f"valkey {one.address} holds 1 chunks" in said(told(url_of(one, "valkey")), "ok")

    def test_master_behind_a_sentinel(self, redis, empty, tmp_path):
        with servers.sentinels("redis", tmp_path, redis) as (sentinel,):
            url = url_of(sentinel, "redis-sentinel")
            fill(url, key_of("a"))
            assert "redis redismaster holds 1 chunks" in said(told(url), "ok")
            unknown = f"{url}/nosuchservice"
            assert f"{sentinel.address}: does not know it" in said(told(unknown), "problem")

    def test_each_node_of_a_cluster_the_dead_one_by_name(self, tmp_path):
        with servers.cluster("redis", tmp_path) as nodes:
            url = url_of(nodes[0], "redis-cluster")
            fill(url, *(key_of(f"{number}") for number in range(40)))
            found = said(told(url), "ok")
            assert all(f"redis {node.address} answers" in found for node in nodes)
            assert found.count("chunks of this namespace") == 3
            nodes[2].kill()
            found = told(url)
            assert f"redis {nodes[2].address} does not answer" in said(found, "problem")
            assert f"redis {nodes[0].address} answers" in said(found, "ok")


class TestCacheServer:
    def test_holds_chunks_of_ours_and_of_lmcaches_own_clients(self):
        with serving("--policy", "s3-fifo", "--max-bytes", "64Mi") as one:
            url = f"lm://127.0.0.1:{one.port}"
            assert f"lm 127.0.0.1:{one.port} holds no chunk at all" in said(told(url), "note")
            fill(url, key_of("a"), key_of("b"))
            with OldClient(one.port) as client:
                client.put("vllm@m@1@0@00ff", b"x" * 100)
                assert client.exist("vllm@m@1@0@00ff")
            found = said(told(url), "ok")
            assert "holds 2 chunks of this namespace, and of another program (1 chunks)" in found
            assert "of 64.0 MiB; when it is full: s3-fifo" in found

    def test_finds_what_lies_on_its_disk_only(self, tmp_path):
        with serving("--data-dir", str(tmp_path)) as one:
            fill(f"lm://127.0.0.1:{one.port}", key_of("a", OTHER_NAMESPACE))
        with serving("--data-dir", str(tmp_path)) as one:
            assert f"only of {THEIRS} (1 chunks)" in said(told(f"lm://127.0.0.1:{one.port}"), "problem")

    def test_token_that_is_wrong(self, tmp_path):
        (tmp_path / "token").write_text("right")
        with serving("--auth-token-file", str(tmp_path / "token")) as one:
            url = f"lm://127.0.0.1:{one.port}"
            (finding,) = told(url, token=PASSWORD)
            assert "lets nobody in with this password or token" in finding[1]
            assert PASSWORD not in finding[1]
            assert "answers in" in said(told(url, token="right"), "ok")

    def test_several_of_which_one_is_dead(self):
        port = servers.free_port()
        with serving() as one:
            found = told(f"lm://127.0.0.1:{one.port},127.0.0.1:{port}")
        assert f"lm 127.0.0.1:{one.port} answers" in said(found, "ok")
        assert f"lm 127.0.0.1:{port} does not answer" in said(found, "problem")

    def test_lmcaches_own_says_no_more_than_that_it_is_there(self):
        server = OldServer()
        try:
            found = told(f"lm://127.0.0.1:{server.port}")
        finally:
            server.close()
        assert "answers in" in said(found, "ok")
        assert "does not say whose chunks it holds" in said(found, "note")


class TestOtherBackends:
    def test_directory(self, tmp_path):
        url = f"file://{tmp_path}/kv"
        assert "No such file" in said(told(url), "problem")
        fill(url, key_of("a"), key_of("a", OTHER_NAMESPACE))
        (tmp_path / "kv" / "notes.txt").write_text("somebody's")
        assert f"remote {tmp_path}/kv holds 1 chunks of this namespace" in said(told(url), "ok")
        assert not os.path.exists(tmp_path / "kv" / ".tmp")

    def test_mooncake(self, tmp_path):
        with mooncake_servers.master(tmp_path) as master:
            url = f"mooncakestore://{master.address}/"
            assert f"{url} answers in" in said(told(url), "ok")
            master.kill()
            found = told(url)
        assert f"{url} does not answer: mooncake: could not join" in said(found, "problem")

    def test_answer_that_comes_too_late_for_any_lookup(self):
        survey = Survey("redis far:6379", "", 0.5, Usage(1, 2**30, None), "allkeys-lru", {OURS: 1})
        (problem,) = [f for f in findings(survey, namespace=OURS, lookup_timeout_s=0.3) if f.level == "problem"]
        assert "answers in 500.0 ms, and a lookup waits for 300 ms" in problem.what

    def test_sample_is_called_one(self):
        survey = Survey("redis a:1", "", 0.001, Usage(1, None, None), "", {THEIRS: 1000}, is_whole=False)
        assert "among the first 1000" in said(
            [(f.level, f.what) for f in findings(survey, namespace=OURS, lookup_timeout_s=1)], "problem"
        )


class TestCommand:
    def test_asks_the_backend_of_the_servers_file_with_its_password(self, serve, tmp_path, capsys):
        with servers.server("redis", tmp_path, "--requirepass", PASSWORD) as one:
            fill(f"redis://:{PASSWORD}@{one.address}", key_of("a"))
            (tmp_path / "c.yaml").write_text(
                f"remote_url: redis://{one.address}\nextra_config:\n  password: {PASSWORD}\n"
            )
            answers = serve(explanation={"namespace": OURS, "components": {}})
            assert cli.main(["doctor", answers.url, "--config", str(tmp_path / "c.yaml")]) == 0
        shown = capsys.readouterr()
        assert f"ok: redis {one.address} holds 1 chunks of this namespace" in shown.out
        assert PASSWORD not in shown.out + shown.err

    def test_is_1_where_a_backend_is_dead(self, serve, capsys):
        url = f"redis://:{PASSWORD}@127.0.0.1:{servers.free_port()}"
        assert cli.main(["doctor", serve().url, "--backend", url, "--namespace", OURS]) == 1
        shown = capsys.readouterr()
        assert "problem: redis 127.0.0.1" in shown.out
        assert PASSWORD not in shown.out + shown.err

    def test_is_2_where_it_is_none_and_its_password_stays_hidden(self, serve, capsys):
        assert cli.main(["doctor", serve().url, "--backend", f"reddis://:{PASSWORD}@h"]) == 2
        shown = capsys.readouterr()
        assert "did you mean redis" in shown.err
        assert PASSWORD not in shown.out + shown.err
