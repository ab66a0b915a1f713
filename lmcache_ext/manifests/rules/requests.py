"""Requests as guides show them: prompts too short to be stored, routes that are not there, texts to be filled in."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lmcache_ext.manifests.bundle import FILE, LMCACHE, REQUEST, URL, Bundle
from lmcache_ext.manifests.findings import Found, Rule
from lmcache_ext.manifests.nodes import Node, rename, replace

DEFAULT_CHUNK = 256
TEMPLATE_TOKENS = 20  # what a chat template adds around a message
_PLACEHOLDER = re.compile(r"<[^<>]+>|x{3,}|X{3,}|changeme|(?i:your[-_ ]).*")
_FILE_NAME = re.compile(r"[\w./-]+\.ya?ml\b")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")


def _chunk_tokens(bundle: Bundle) -> int:
    """The smallest chunk size in sight."""
    written = [node.text for document in bundle.settings if (node := document.node.at("chunk_size"))]
    return min((int(text) for text in written if text.isdigit()), default=DEFAULT_CHUNK)


def _texts(request: Node) -> list[Node]:
    prompt = request.at("prompt")
    if prompt is not None:
        return [prompt] if prompt.is_scalar else [*prompt.items()]
    contents = [item.at("content") for item in request.items_at("messages")]
    return [content for content in contents if content is not None]


def _estimate(text: str) -> int:
    """Tokens of a text, within a third or so: a word or a mark each, long words more."""
    return sum(max(1, len(word) // 6) for word in re.findall(r"\w+|[^\w\s]", text))


def _short(bundle: Bundle) -> Iterator[Found]:
    chunk = _chunk_tokens(bundle)
    for document in bundle.of(REQUEST):
        texts = _texts(document.node)
        if not texts or any("$(" in text.text or "{{" in text.text for text in texts):
            continue  # filled in by a shell or a template
        tokens = sum(_estimate(text.text) for text in texts)
        tokens += TEMPLATE_TOKENS if document.node.at("messages") else 0
        if tokens * 3 // 2 < chunk:
            message = f"a prompt of about {tokens} tokens is shorter than a chunk of {chunk}"
            yield Found(texts[0], message, f"send more than {chunk} tokens, or lower chunk_size", at_value=True)


def _route(bundle: Bundle) -> Iterator[Found]:
    for document in bundle.of(URL):
        found = re.fullmatch(r"(https?://[^/]+)(/(?:chat/)?completions)/?", document.node.text)
        if found is not None:
            better = f"{found[1]}/v1{found[2]}"
            message = f"{found[2]} without /v1"
            yield Found(document.node, message, f"write {better}", replace(document.node, better), at_value=True)


def _other_file(bundle: Bundle) -> Iterator[Found]:
    """A command names a file that the guide nowhere else does, and the guide names one almost like it."""
    for document in bundle.of(FILE):
        named = document.node.text
        text = document.node.window.file.text
        others = {name for name in _FILE_NAME.findall(text) if name != named}
        name = named.rpartition("/")[2]
        near = [other for other in sorted({each.rpartition("/")[2] for each in others}) if _one_word_apart(name, other)]
        if near and text.count(name) == 1:
            better = named.removesuffix(name) + near[0]
            message = f"{name} is named nowhere else here, {near[0]} is"
            yield Found(document.node, message, f"write {better}", replace(document.node, better), at_value=True)


def _one_word_apart(one: str, other: str) -> bool:
    return len(set(re.split("[-_.]", one)) ^ set(re.split("[-_.]", other))) == 1


def _placeholder(bundle: Bundle) -> Iterator[Found]:
    for document in bundle.documents:
        if document.kind in (REQUEST, URL, FILE, LMCACHE):
            continue
        for node in document.node.walk():
            if node.is_scalar and node.is_string and _PLACEHOLDER.fullmatch(node.text):
                yield Found(
                    node,
                    f"{node.text} is to be filled in",
                    "write your own, and keep it out of the repository",
                    at_value=True,
                )


def _token(bundle: Bundle) -> Iterator[Found]:
    for document in bundle.documents:
        for node in document.node.walk():
            value = node.at("value") if node.text_at("name") in _TOKENS else None
            if value is not None and value.is_scalar and not value.is_null:
                ref = {"secretKeyRef": {"name": "hf-secret", "key": "HF_TOKEN"}}
                edits = (*rename(value, "valueFrom"), *replace(value, ref))
                message = f"{node.text_at('name')} is written into the pod"
                yield Found(value, message, "take it from a Secret by secretKeyRef", edits)


RULES = (
    Rule("prompt-short", "warning", "only whole chunks are stored: this prompt never leaves anything to hit", _short),
    Rule(
        "route",
        "warning",
        "production-stack's router answers 404 there (this runtime answers with and without /v1)",
        _route,
    ),
    Rule("file-name", "warning", "the command fails, or installs another file than the one that is shown", _other_file),
    Rule("placeholder", "note", "a text that a guide means to be replaced", _placeholder),
    Rule("token-in-pod", "warning", "who may read pods reads the token; a Secret has rights of its own", _token),
)
