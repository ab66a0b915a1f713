"""Files that cannot be honoured: each is one line with the place, the key, the value and the way out."""

import os
import time

import pytest

from lmcache_ext.config import load_config
from lmcache_ext.errors import ConfigError

_FP8 = "extra_config: {host_kv_dtype: fp8}\n"
# (name, content, line or None, what the message must hold)
FILES = [
    ("empty", "", None, ["the file is empty", "write at least one setting"]),
    ("blank", "\n  \n", None, ["the file is empty"]),
    ("only_comments", "# chunk_size: 256\n", None, ["the file is empty"]),
    ("list", "- chunk_size: 256\n", 1, ["not a list of 'key: value' lines", "chunk_size: 256"]),
    ("scalar", "chunk_size\n", 1, ["not a list of 'key: value' lines"]),
    ("missing_space", "a: 1\nchunk_size:256\n", 2, ["could not find expected ':'"]),
    ("unclosed_quote", 'local_cpu: 1\nremote_url: "redis://h\n\n', 2, ["unexpected end of stream"]),
    ("unclosed_bracket", "p2p_init_ports: [1, 2\n", 2, ["expected ',' or ']'"]),
    ("bad_indent", "chunk_size: 1\n  local_cpu: true\n", 2, ["mapping values are not allowed here"]),
    ("tab", "chunk_size: 1\nextra_config:\n\ta: 1\n", 3, ["\\t", "indent with spaces instead of tabs"]),
    (
        "second_document",
        "chunk_size: 1\n---\nlocal_cpu: true\n",
        2,
        ["a second document begins here", "remove the '---'"],
    ),
    ("anchor", "a: &x 1\nb: *x\n", 1, ["anchors (&name)", "write the value out"]),
    ("alias_bomb", "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n", 1, ["anchors (&name)"]),
    ("merge_key", "<<: {chunk_size: 1}\n", 1, ["the key '<<' is not a name"]),
    ("python_tag", "chunk_size: !!python/object/apply:os.system ['true']\n", 1, ["tags (!name)", "plain value"]),
    ("tag", "chunk_size: !!int '7'\n", 1, ["tags (!name)"]),
    ("deep", "a: " + "[" * 100 + "]" * 100, 1, ["nested more than 32 deep", "write it flatter"]),
    ("number_key", "256: chunk_size\n", 1, ["the key '256' is not a name", "chunk_size: 256"]),
    ("null_key", "~: 1\n", 1, ["the key '~' is not a name"]),
    ("list_key", "? [a]\n: 1\n", 1, ["is not a name"]),
    ("boolean_key", "on: 1\n", 1, ["the key 'on' is not a name"]),
    ("line_break_in_key", '"chunk\\nsize": 1\n', 1, ["the key 'chunk\\nsize' is not a name"]),
    ("number_key_within", "extra_config:\n  1: x\n", 2, ["the key '1' is not a name"]),
    ("twice", "chunk_size: 1\nlocal_cpu: true\nchunk_size: 2\n", 3, ["chunk_size", "in line 1 too", "remove one"]),
    ("twice_within", "extra_config:\n  a: 1\n  a: 2\n", 3, ["a: written twice, in line 2 too"]),
    ("twice_on_a_line", "{chunk_size: 1, chunk_size: 2}", 1, ["written twice, in line 1 too"]),
    ("control_character", "chunk_size: 1\nlocal_cpu: \x07\n", 2, ["unprintable character U+0007", "remove it"]),
    ("not_utf8", b"chunk_size: 1\nlocal_disk: /caf\xe9\n", 2, ["not UTF-8", "0xe9", "save the file as UTF-8"]),
    ("utf16", "chunk_size: 1\n".encode("utf-16"), 1, ["not UTF-8"]),
    ("no_such_date", "app_id: 2026-99-99\n", 1, ["app_id: '2026-99-99' is not a valid value", "put it in quotes"]),
    ("too_large", "#" * (1024 * 1024 + 1), None, ["larger than 1048576 bytes"]),
    ("misspelt", "local_cpu: true\n\nchunksize: 256\n", 3, ["chunksize (here 256)", "did you mean chunk_size?"]),
    ("camel_case", "cpuOffloadingBufferSize: '20'\n", 1, ["did you mean max_local_cpu_size?"]),
    ("unknown", "xyzzy_quux: 1\n", 1, ["xyzzy_quux (here 1)", "remove it; 'lmcache-ext keys' lists all"]),
    ("helm_values", "servingEngineSpec:\n  modelSpec: []\n", 1, ["Helm values", "LMCache's own keys"]),
    ("config_map", "kind: ConfigMap\nmetadata: {}\n", 1, ["Kubernetes manifest", "its data"]),
    ("isvc", "apiVersion: v1beta1\nkind: InferenceService\n", 2, ["'InferenceService' is a Kubernetes manifest"]),
    ("fraction", "chunk_size: 256.5\n", 1, ["chunk_size: 256.5 is not a whole number"]),
    ("zero_chunk", "chunk_size: 0\n", 1, ["chunk_size: 0 is out of range", "from 1 to"]),
    ("negative_chunk", "chunk_size: -256\n", 1, ["chunk_size: -256 is out of range"]),
    ("word_chunk", "chunk_size: big\n", 1, ["chunk_size: 'big' is not a whole number"]),
    ("true_chunk", "chunk_size: true\n", 1, ["chunk_size: True is not a whole number"]),
    ("no_chunk", "chunk_size:\n", 1, ["chunk_size: None has no value", "remove it"]),
    ("boolean", "local_cpu: enabled\n", 1, ["local_cpu: 'enabled' is not a yes or a no", "true or false"]),
    ("negative_size", "max_local_cpu_size: -1\n", 1, ["max_local_cpu_size: -1 is not a size", "20Gi"]),
    ("nan_size", "max_local_cpu_size: .nan\n", 1, ["max_local_cpu_size: nan is not a size"]),
    ("infinite_size", "max_local_cpu_size: .inf\n", 1, ["max_local_cpu_size: inf is not a size"]),
    ("byte_size", "max_local_cpu_size: 21474836480\n", 1, ["more than 1 PiB", 'write "20Gi"']),
    ("word_size", "max_local_cpu_size: 5 apples\n", 1, ["'5 apples' is not a size"]),
    ("zero_size", "max_local_cpu_size: 0\n", 1, ["lets nothing be stored in host memory", "local_cpu: false"]),
    ("zero_disk", "local_disk: /d\nmax_local_disk_size: 0.0\n", 2, ["nothing be stored in /d", "remove local_disk"]),
    ("relative_disk", "local_disk: kv/cache\n", 1, ["'kv/cache' is not an absolute directory", "write /path"]),
    ("file_host", "local_disk: file://kv/cache/\n", 1, ["is not an absolute directory", "file:///kv/cache/ for /kv/c"]),
    ("old_file_host", "local_device: file://local_disk/\n", 1, ["local_device: 'file://local_disk/'", "/local_disk/"]),
    ("remote_file_host", "remote_url: file://nfs/kv\n", 1, ["is not an absolute directory", "file:///nfs/kv for /nfs"]),
    ("remote_as_disk", "local_disk: redis://h\n", 1, ["is not a directory", "redis:// as remote_url"]),
    ("policy", "cache_policy: RANDOM\n", 1, ["'RANDOM' is not known", "LRU, ARC, LFU, FIFO, MRU"]),
    ("serde", "remote_serde: zstd\n", 1, ["'zstd' is not known", "naive, cachegen"]),
    ("copier", "extra_config: {cuda_page_copier: cuda}\n", 1, ["cuda_page_copier: 'cuda'", "vllm, kernels"]),
    ("copiers", "extra_config: {host_kv_dtype: fp8, cuda_page_copier: vllm}\n", 1, ["fp8 needs the kernels", "remove"]),
    ("host_dtype", "extra_config: {host_kv_dtype: fp4}\n", 1, ["host_kv_dtype: 'fp4' is not known", "auto, fp8"]),
    ("twice_lossy", f"{_FP8}remote_url: lm://h:1\nremote_serde: int8\n", 3, ["remote_serde: 'int8' needs", "naive or"]),
    ("lossy_disk", f"{_FP8}local_disk: /d\nlocal_disk_serde: fp8\n", 3, ["host_kv_dtype: fp8 has left 8", "remove"]),
    ("level", "log_level: LOUD\n", 1, ["log_level: 'LOUD' is not known", "DEBUG, INFO"]),
    ("device", "local_device: tpu\n", 1, ["local_device: 'tpu' is not a device", "local_disk: /path"]),
    ("timeout", "blocking_timeout_secs: 0\n", 1, ["blocking_timeout_secs: 0 is out of range", "above 0"]),
    ("word_timeout", "blocking_timeout_secs: soon\n", 1, ["'soon' is not a number"]),
    ("negative_tokens", "min_retrieve_tokens: -1\n", 1, ["-1 is out of range", "at least 0"]),
    ("extra", "extra_config: fast\n", 1, ["extra_config:", "is not a mapping", "JSON such as"]),
    ("extra_list", "extra_config: [1]\n", 1, ["extra_config: [1] is not a mapping"]),
    ("extra_database", "extra_config:\n  x: 1\n  valkey_database: -1\n", 3, ["extra_config.valkey_database: -1"]),
    ("number_id", "lmcache_instance_id: 0123\n", 1, ["lmcache_instance_id: 83 is not text", "put it in quotes"]),
    ("port", "p2p_init_ports: [8200, 99999]\n", 1, ["p2p_init_ports: [8200, 99999]", "from 1 to 65535"]),
    ("no_ports", "p2p_init_ports: []\n", 1, ["is an empty list"]),
    ("pull_url", "controller_pull_url: localhost\n", 1, ["'localhost' has no port", "write host:port"]),
    ("old_name", "peer_init_ports: many\n", 1, ["peer_init_ports: 'many' is not a whole number"]),
]
URLS = [
    ("redis.default:6379", "has no scheme"),
    ("reddis://h:6379", "unknown scheme 'reddis': did you mean redis://"),
    ("gopher9://h", "unknown scheme 'gopher9'"),
    ("http://h:80", "unknown scheme 'http'"),
    ("redis://", "has no host"),
    ("redis:///0", "has no host"),
    ("redis://h:port", "port that is not a number"),
    ("redis://h:0", "port that is not a number"),
    ("redis://h:65536", "port that is not a number"),
    ("redis://h:", "port that is not a number"),
    ("redis://h:6379/main", "database that is not a number"),
    ("redis://h h:6379", "has a blank"),
    ("redis://a:1,b:2", "takes one"),
    ("redis://u:a#b@h:6379", "%23"),
    ("redis-sentinel://a:1,,b:2", "has no valid host"),
    ("lm://localhost", "has no port: write lm://host:65432"),
    ("lm://:65432", "has no valid host"),
    ("unix://", "has no absolute path"),
    ("fs://host", "has no absolute path"),
    ("fs:relative", "has no scheme"),
]
GOOD_URLS = [
    "redis://user:password@h:6379/0",
    "redis://:password@h:6379/1",
    "rediss://h:6379?ssl_cert_reqs=none",
    "redis://[::1]:6379",
    "redis://h",
    "unix:///tmp/redis.sock?db=1",
    "redis-sentinel://user:pw@h1:26379,h2:26380,h3",
    "redis-cluster://h1:7000,h2:7001",
    "valkey://h:6379",
    "REDIS://h",
    "infinistore://127.0.0.1:12345/?device=mlx5_1",
    "mock://10/?peeking_latency=1&read_throughput=2",
    "plugin://mine.first",
]


def refused(path, environ=None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path=str(path), environ=environ or {})
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


@pytest.mark.parametrize(("content", "line", "parts"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_malformed_file(tmp_path, content, line, parts):
    path = tmp_path / "lmcache_config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(path)
    assert message.startswith(f"{path}: " if line is None else f"{path}:{line}: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(("url", "problem"), URLS)
def test_malformed_url(tmp_path, url, problem):
    path = tmp_path / "c.yaml"
    path.write_text(f"# the store\nremote_url: '{url}'\n")
    message = refused(path)
    assert message.startswith(f"{path}:2: remote_url: '")
    assert problem in message
    assert "write" in message or "did you mean" in message


@pytest.mark.parametrize("url", GOOD_URLS)
def test_url_that_is_well_formed(url):
    assert load_config(environ={"LMCACHE_REMOTE_URL": f"'{url}'"}).live.remote_url == url


def test_missing_file(tmp_path):
    message = refused(tmp_path / "none.yaml")
    assert message == f"{tmp_path}/none.yaml: no such file: mount the ConfigMap there or correct LMCACHE_CONFIG_FILE"


def test_directory(tmp_path):
    assert refused(tmp_path) == f"{tmp_path}: is a directory: name the file in it"
    (tmp_path / "lmcache_config.yaml").touch()
    assert refused(tmp_path).endswith(f"such as {tmp_path}/lmcache_config.yaml")


def test_path_with_a_nul():
    assert "cannot be read (embedded null byte)" in refused("/tmp/a\0b")


def test_path_through_a_file(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be read (Not a directory)" in refused(tmp_path / "file" / "c.yaml")


def test_loop_of_links(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be read (Too many levels of symbolic links)" in refused(tmp_path / "loop")


def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe").endswith("is not a regular file: name a YAML file")


def test_unreadable_file(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    path = tmp_path / "c.yaml"
    path.touch()
    assert "cannot be read (Permission denied): correct its name or its permissions" in refused(path)


def test_many_keys_take_no_quadratic_time(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("extra_config: {" + ",".join(f"k{i}: 1" for i in range(3000)) + "}\nchunksize: 1\n")
    started_s = time.monotonic()
    assert "did you mean chunk_size?" in refused(path)
    assert time.monotonic() - started_s < 5


def test_byte_order_mark_and_windows_lines_are_fine(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbfchunk_size: 64\r\nlocal_cpu: yes\r\n")
    assert load_config(path=str(path), environ={}).chunk_size == 64


def test_bad_json_in_a_variable():
    with pytest.raises(ConfigError, match=r"^LMCACHE_EXTRA_CONFIG: extra_config: '\*\*\*' is not a mapping: write "):
        load_config(environ={"LMCACHE_EXTRA_CONFIG": "{'a': 1}"})
