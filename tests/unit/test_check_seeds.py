"""`check` on the manifests of the tutorials, word for word: exactly the traps that are in them."""

import shutil
from pathlib import Path

import pytest

from lmcache_ext.cli import main
from lmcache_ext.manifests.check import check, mend, read_files
from lmcache_ext.manifests.findings import Finding

SEEDS = Path(__file__).resolve().parents[1] / "data" / "seeds"
P2P = ["enable_p2p", "p2p_host", "p2p_init_ports", "p2p_lookup_ports", "transfer_channel", "enable_controller"]

# file -> "line:column rule severity"; what is found in the file alone
FOUND = {
    "000_values.yaml": [
        "15:7 helm-prefix-off note",
        "23:15 placeholder note",
        "25:1 helm-cache-server error",
        "31:3 helm-cache-server-image warning",
        "32:3 helm-cache-server-image warning",
    ],
    "000_request.json": ["3:13 prompt-short warning"],
    "001_lmcache_config.yaml": ["2:1 setting-old warning", "3:1 setting-old warning"],
    "002_values.yaml": [
        "14:7 helm-prefix-off note",
        "23:9 token-in-pod warning",
        "23:16 placeholder note",
    ],
    "003_lmcache_config.yaml": [],
    "004_configmap.yaml": [],
    "004_secret.yaml": ["7:13 placeholder note"],
    "004_redis.yaml": [
        "18:11 redis-unbounded warning",
        "18:11 server-unbounded warning",
        "18:11 server-forgets note",
        "19:18 image-latest note",
    ],
    "004_lm_server_deployment.yaml": [
        "18:11 server-unbounded warning",
        "18:11 server-forgets note",
        "21:15 server-command warning",
        "23:15 not-a-string error",
    ],
    "004_lm_server.yaml": [],
    "004_inferenceservice.yaml": [
        "1:1 api-version error",
        "5:3 grace-period warning",
        "14:11 quoted-arg error",
        "23:11 variable-no-op note",
        "35:11 resource-name error",
    ],
    "004_request.json": ["4:39 prompt-short warning"],
}


def summary(findings: list[Finding]) -> list[str]:
    return [f"{one.place.line}:{one.place.column} {one.rule} {one.severity}" for one in findings]


@pytest.mark.parametrize("name", FOUND)
def test_a_seed_has_exactly_its_traps(name):
    files, problems = read_files([str(SEEDS / name)])
    assert problems == []
    assert summary(check(files).findings) == FOUND[name]


def test_the_peers_of_seed_003_are_accepted_and_said_to_have_no_effect():
    files, _ = read_files([str(SEEDS / "003_p2p_example1.yaml"), str(SEEDS / "003_p2p_example2.yaml")])
    findings = check(files).findings
    assert {one.rule for one in findings} <= {"setting-no-effect"}
    assert all(one.severity == "note" for one in findings)


def test_seed_004_is_seen_together():
    """The ConfigMap says how much host memory there is, the InferenceService whether there is room for it."""
    files, _ = read_files([str(SEEDS / "004_inferenceservice.yaml"), str(SEEDS / "004_configmap.yaml")])
    together = check(files).findings
    alone = set(FOUND["004_inferenceservice.yaml"])
    more = [one for one in together if f"{one.place.line}:{one.place.column} {one.rule} {one.severity}" not in alone]
    assert [one.rule for one in more] == ["shm-unseen"]
    assert "max_local_cpu_size of 2 GiB" in more[0].message
    assert f"{SEEDS / '004_configmap.yaml'}:9:5" in more[0].message


@pytest.mark.parametrize("name", [name for name in FOUND if name.endswith(".yaml")])
def test_a_mended_seed_passes(name, tmp_path, capsys):
    path = Path(shutil.copy(SEEDS / name, tmp_path))
    before = path.read_text()
    assert main(["check", "--fix", str(path)]) == 0
    assert main(["check", str(path)]) == 0
    after = path.read_text()
    changed = any(line.endswith(("warning", "error")) for line in FOUND[name])
    assert (after != before) == changed
    assert [line for line in before.splitlines() if "#" in line] == [line for line in after.splitlines() if "#" in line]


def test_seed_004_mended_reads_as_its_authors_meant_it():
    files, _ = read_files([str(SEEDS / "004_inferenceservice.yaml")])
    text = mend(files).fixed[0].text
    assert text.startswith("apiVersion: serving.kserve.io/v1beta1\nkind: InferenceService\n")
    assert """        - --kv-transfer-config={"kv_connector":"LMCacheConnectorV1", "kv_role":"kv_both"}\n""" in text
    assert """          memory: 24Gi\n          nvidia.com/gpu: "1"\n      volumeMounts""" in text
    assert text.endswith("              path: lmcache_config.yaml\n    terminationGracePeriodSeconds: 50\n")


def test_what_the_readme_shows_passes():
    files, _ = read_files([str(SEEDS.parents[2] / "README.md")])
    assert [one for one in check(files).findings if one.severity != "note"] == []


GUIDE = """\
# A guide

1. Write this:

   ```yaml
   apiVersion: v1
   kind: Secret
   metadata:
     name: s
   stringData:
     port: 8080
   ```

2. Run `helm install -f` with `values-06-shared.yaml`, and ask:

```sh
helm install x -f values-06-remote-shared.yaml
curl -X POST http://localhost:30080/completions -d '{
  "prompt": "Hello",
  "max_tokens": 1}'
```
"""


def test_the_code_blocks_of_a_guide_are_checked_where_they_stand(tmp_path):
    path = tmp_path / "guide.md"
    path.write_text(GUIDE)
    files, _ = read_files([str(path)])
    assert summary(check(files).findings) == [
        "11:12 not-a-string error",
        "17:19 file-name warning",
        "18:14 route warning",
        "19:13 prompt-short warning",
    ]
    fixed = mend(files).fixed[0].text
    assert '     port: "8080"\n   ```\n' in fixed
    assert "curl -X POST http://localhost:30080/v1/completions -d '{\n" in fixed


def test_a_guide_in_restructured_text_is_read_too(tmp_path):
    path = tmp_path / "guide.rst"
    path.write_text("Title\n~~~~~\n\n.. code-block:: yaml\n\n   chunk_size: 250  # odd\n\nText: 1\n")
    files, _ = read_files([str(path)])
    assert summary(check(files).findings) == ["6:16 chunk-block error"]
    assert "   chunk_size: 240  # odd\n" in mend(files).fixed[0].text
