"""With whom requests share: salts, names and API keys."""

from __future__ import annotations

import asyncio
import hashlib
from types import SimpleNamespace

import pytest

from vllm_specplugin.config import CONFIG_KEY, SpecConfig
from vllm_specplugin.vllm.frontend import tenants
from vllm_specplugin.vllm.frontend.admission import scoped


def engine(**settings):
    ours = SpecConfig(**settings).to_dict()
    return SimpleNamespace(additional_config={CONFIG_KEY: ours})


def scope_of(values, salt, **settings) -> str:
    return (scoped(engine(**settings), values, salt) or {}).get("spec_cache_scope", "")


def test_a_salt_or_a_name_makes_a_scope() -> None:
    mine = {"spec_cache_scope": "a"}
    scopes = [scope_of(v, s) for v in (None, mine) for s in (None, "salt", "other")]
    assert scopes[0] == "" and len(set(scopes)) == 6
    assert mine == {"spec_cache_scope": "a"}  # the caller's is left as it is
    assert all("salt" not in scope for scope in scopes)
    assert scope_of({"spec_max_nodes": 2}, None) == ""


def test_an_operator_may_have_salts_share() -> None:
    assert scope_of(None, "salt", cache_scope="shared") == ""
    assert scope_of({"spec_cache_scope": "a"}, None, cache_scope="shared") != ""


def test_where_the_plugin_is_off_nothing_is_added() -> None:
    off = SimpleNamespace(additional_config={})
    assert scoped(off, {"x": 1}, "salt") == {"x": 1}


def serve(header: bytes | None, inner) -> None:
    app = tenants.TenantMiddleware(inner)
    headers = [] if header is None else [(b"authorization", header)]
    asyncio.run(app({"type": "http", "headers": headers}, None, None))


@pytest.fixture(autouse=True)
def inactive(monkeypatch) -> None:
    monkeypatch.setattr(tenants, "_active", False)


def test_keys_are_told_apart_also_in_tasks_of_the_request() -> None:
    seen: dict[bytes, set[str]] = {}
    header = b""

    async def inner(scope, receive, send) -> None:
        async def task() -> None:
            seen.setdefault(header, set()).add(scope_of(None, None))

        await task()
        await asyncio.create_task(task())

    for header in (b"Bearer one", b"Bearer two", b"Bearer one"):
        serve(header, inner)
    assert all(len(scopes) == 1 for scopes in seen.values())
    assert seen[b"Bearer one"] != seen[b"Bearer two"]
    told = next(iter(seen[b"Bearer one"]))
    assert told and told not in hashlib.sha256(b"one").hexdigest()


def test_of_several_keys_the_one_that_vllm_checks_counts() -> None:
    seen = []

    async def inner(scope, receive, send) -> None:
        seen.append(scope_of(None, None))

    async def ask(*keys: bytes) -> None:
        headers = [(b"authorization", b"Bearer " + key) for key in keys]
        scope = {"type": "http", "headers": headers}
        await tenants.TenantMiddleware(inner)(scope, None, None)

    for keys in ([b"one"], [b"one", b"two"], [b"two", b"one"]):
        asyncio.run(ask(*keys))
    assert seen[0] == seen[1] != seen[2]


def test_what_is_no_request_has_no_tenant() -> None:
    seen = []

    async def inner(scope, receive, send) -> None:
        seen.append(tenants._tenant.get())

    asyncio.run(tenants.TenantMiddleware(inner)({"type": "lifespan"}, None, None))
    assert seen == [None]


def test_without_its_context_a_request_shares_with_nobody() -> None:
    assert scope_of(None, None) == ""

    async def nothing(*_) -> None:
        pass

    serve(None, nothing)
    assert scope_of(None, None) != scope_of(None, None) != ""


@pytest.mark.parametrize(
    ("keys", "setting", "added"),
    [
        (["a", "b"], "tenant", True),
        (["a", "b"], "shared", False),
        (["a", "a"], "tenant", False),
        (None, "tenant", False),
    ],
)
def test_the_middleware_is_there_where_keys_differ(keys, setting, added) -> None:
    config = engine(cache_scope=setting).additional_config
    args = SimpleNamespace(api_key=keys, middleware=["m.x"], additional_config=config)
    for _ in range(2):
        tenants.add_middleware(args)
    assert args.middleware == ["m.x", *([tenants.MIDDLEWARE] if added else [])]


def test_vllms_own_wiring_tells_keys_apart(monkeypatch) -> None:
    """Its authentication, its ``--middleware``, and a response that streams, which
    is where requests of its API are admitted."""
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    from starlette.testclient import TestClient
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

    app = FastAPI()

    @app.get("/v1/scope")
    async def scope() -> StreamingResponse:
        async def body():
            yield scope_of(None, None)

        return StreamingResponse(body())

    args = SimpleNamespace(
        api_key=["one", "two"],
        middleware=[],
        additional_config=engine().additional_config,
        allowed_origins=["*"],
        allow_credentials=False,
        allowed_methods=["*"],
        allowed_headers=["*"],
        enable_request_id_headers=False,
    )
    tenants.add_middleware(args)
    init_entrypoints_middleware(args, app, ())
    with TestClient(app) as client:

        def ask(key: str) -> str:
            headers = {"Authorization": f"Bearer {key}"}
            answer = client.get("/v1/scope", headers=headers)
            return answer.text if answer.status_code == 200 else ""

        assert ask("one") == ask("one") != ask("two")
        assert ask("two") and not ask("three")
