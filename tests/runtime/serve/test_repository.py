"""Models that are loaded, exchanged and unloaded while clients ask: no answer is wrong, and none is lost."""

import base64
import json
import os
import shutil
import threading
import weakref
from pathlib import Path

import msgspec
import numpy as np
import openai
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

import invariclip
from invariclip.artifact.folder import new_artifact
from invariclip.artifact.signature import REQUIRED
from invariclip.errors import InputError
from invariclip.serve.limits import Limits
from invariclip.serve.metrics import Metrics
from invariclip.serve.models import ServedModels
from invariclip.serve.repository import ListedModel, LoadedModel, ModelRepository
from invariclip.serve.service import Batching, Processors, Service, name_of
from invariclip.serve.sites import LiveSiteOptions, SiteRegistry
from invariclip.sites.live_site import SiteWindow
from invariclip.sites.site import read_site

ADMIN = {"authorization": "Bearer root"}
ROUTE = "/v2/repository"


def replace(artifact, by):
    """As `export` does: the new artifact takes the old one's place in one step."""
    with new_artifact(artifact) as folder:
        for path in by.iterdir():
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, folder / path.name)


@pytest.fixture
def desk(tmp_path, tiny_artifact, other_artifact):
    """`a.icm` and `b.icm`, given at the start, and a folder with `c.icm`."""
    shutil.copytree(tiny_artifact, tmp_path / "a.icm")
    shutil.copytree(other_artifact, tmp_path / "b.icm")
    shutil.copytree(other_artifact, tmp_path / "root" / "c.icm")
    return tmp_path


@pytest.fixture
def opened(desk, serving):
    """Opens a server of some of the desk's artifacts, with a folder of artifacts, and an admin key."""
    open_now = []

    def of(*names, most=8, make=Service, adapt=None, **options):
        processors = Processors(2)

        def made(name, folder):
            """One image a run: the bits of a batch are the engine's own affair."""
            model = invariclip.load(folder, threads=1)
            registry = SiteRegistry(model, running=adapt)
            return make(
                model, Limits(seconds=20), Batching(max_batch=1, decoders=2), name=name, processors=processors,
                sites=registry,
            )  # fmt: skip

        folders = {name: desk / f"{name}.icm" for name in names}
        services = [made(name, folder) for name, folder in folders.items()]
        for service in services:
            service.warm_up()
        models = ServedModels(services, several=True)
        repository = ModelRepository(models, made, folders, roots=[desk / "root"], most=most)
        context = serving(
            models, options.pop("metrics", Metrics()), repository=repository, admin_keys=("root",), **options
        )
        client = context.__enter__()
        open_now.append(context)
        client.repository = repository
        return client

    yield of
    for context in open_now:
        context.__exit__(None, None, None)


def admin(client, path, body=None, headers=ADMIN):
    return client("POST", f"{ROUTE}{path}", None if body is None else json.dumps(body), "application/json", headers)


def vector_of(answer):
    """The one embedding of an answer, whose float32 come back bit for bit."""
    return np.array(answer.json["embeddings"][0], dtype=np.float32)


def embedded(client, image, query=""):
    return client("POST", f"/v1/embed{query}", image, "image/png")


class Clients:
    """Threads that ask one route, again and again."""

    def __init__(self, client, images, query="", count=8):
        self.client, self.images, self.query = client, images, query
        self.answers, self.lost, self.over = [], [], threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]

    def _ask(self, number):
        while not self.over.is_set():
            place = (number + len(self.answers)) % len(self.images)
            try:
                self.answers.append((place, embedded(self.client, self.images[place], self.query)))
            except Exception as error:  # the server broke off
                self.lost.append(error)
                return

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()

    def go_on(self, until, count=20):
        """Waits for so many more answers."""
        wanted = len(self.answers) + count
        until(lambda: len(self.answers) >= wanted or self.lost)
        assert not self.lost

    def space_ids(self, wanted):
        """Which spaces the answers are of; each answer must be the bits that its space's model gives."""
        assert not self.lost
        found = []
        for place, answer in self.answers:
            assert answer.status == 200, answer.body
            space = answer.json["space_id"]
            assert np.array_equal(vector_of(answer), wanted[space][place])
            found.append(space)
        return found


@pytest.fixture(scope="module")
def wanted(model, other_model, images):
    """By space, the library's embedding of each image alone."""
    return {
        each.space_id: [each.embed_images([image], batch_size=1)[0] for image in images]
        for each in (model, other_model)
    }


def test_no_answer_is_wrong_or_lost_while_a_model_is_exchanged(
    opened, desk, images, until, wanted, model, other_model, tiny_artifact, other_artifact
):
    client = opened("a")
    first = weakref.ref(client.api.models.find("a").service)
    with Clients(client, images) as clients:
        clients.go_on(until)
        for turn in range(4):
            replace(desk / "a.icm", tiny_artifact if turn % 2 else other_artifact)
            until(lambda: not client.repository._changing.locked())
            told = admin(client, "/models/a/load")
            assert told.status == 200, told.body
            assert msgspec.convert(told.json, LoadedModel).replaced
            assert told.json["space_id"] == (model if turn % 2 else other_model).space_id
            clients.go_on(until)
    spaces = clients.space_ids(wanted)
    assert set(spaces) == set(wanted)  # both answered
    until(lambda: not client.repository._changing.locked())
    assert first() is None  # closed, and its memory free
    assert client.api.models.find("a").requests == 0
    assert len(client.api.models.names) == 1


def test_the_old_model_answers_what_it_has_taken(opened, desk, images, until, gated, wanted, model, other_artifact):
    """One request is in the old engine; the new model answers meanwhile, and the old one is closed after it."""
    made = []

    def make(*given, **options):
        service = (gated if not made else Service)(*given, **options)
        if not made:
            service.gate.set()
        made.append(service)
        return service

    client = opened("a", make=make)
    old = made[0]
    old.gate.clear()
    while old.begun.acquire(blocking=False):
        pass
    late = []
    thread = threading.Thread(target=lambda: late.append(embedded(client, images[0])))
    thread.start()
    assert old.begun.acquire(timeout=20)
    replace(desk / "a.icm", other_artifact)
    try:
        assert admin(client, "/models/a/load").json["replaced"]
        answer = embedded(client, images[1])
        assert np.array_equal(vector_of(answer), wanted[answer.json["space_id"]][1])
        assert answer.json["space_id"] != model.space_id
        assert not late
        busy = admin(client, "/models/a/load")
        assert (busy.status, busy.headers["retry-after"]) == (503, "1")
        assert "still answers" in busy.error
    finally:
        old.gate.set()
    thread.join(20)
    assert late[0].status == 200
    assert late[0].json["space_id"] == model.space_id
    assert np.array_equal(vector_of(late[0]), wanted[model.space_id][0])
    until(lambda: not client.repository._changing.locked())
    assert not old.images._open


def test_an_artifact_that_cannot_be_loaded_leaves_the_old_one(opened, desk, images, model, capsys, wanted):
    client = opened("a")
    service = client.api.models.find("a").service
    graph = next((desk / "a.icm").glob("image*.onnx"))
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    told = admin(client, "/models/a/load")
    assert told.status == 422
    assert "a was not loaded; the one that was loaded before goes on" in told.error
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("invariclip: a: not loaded; the one that was loaded before goes on: ")
    assert graph.name in line
    [listed] = [one for one in admin(client, "/index").json if one["name"] == "a"]
    assert listed["state"] == "READY"
    assert graph.name in listed["reason"]
    assert client.api.models.find("a").service is service
    answer = embedded(client, images[0])
    assert np.array_equal(vector_of(answer), wanted[model.space_id][0])
    graph.write_bytes(whole)
    assert admin(client, "/models/a/load").status == 200
    assert not any(one["reason"] for one in admin(client, "/index").json)


def test_an_artifact_that_is_gone_leaves_the_old_one(opened, desk, images, capsys):
    client = opened("a")
    assert admin(client, "/models/c/load").status == 200
    capsys.readouterr()
    shutil.rmtree(desk / "root" / "c.icm")
    told = admin(client, "/models/c/load")
    assert (told.status, "c was not loaded; the one that was loaded before goes on" in told.error) == (422, True)
    assert "no artifact is called 'c'" in capsys.readouterr().err
    assert embedded(client, images[0], "?model=c").status == 200


def test_an_unexpected_error_leaves_the_old_one_too(opened, images, caplog):
    made = []

    class Fails(Service):
        def warm_up(self):
            made.append(self)
            if len(made) > 1:
                raise MemoryError("no room")
            super().warm_up()

    client = opened("a", make=Fails)
    told = admin(client, "/models/a/load")
    assert told.status == 500
    assert "no room" not in told.error
    assert "a: not loaded; the one that was loaded before goes on" in caplog.text
    assert not made[1].images._open  # what was made of it is closed
    assert embedded(client, images[0]).status == 200
    assert admin(client, "/index").json[0]["reason"].startswith("an unexpected error (MemoryError)")


def test_a_signature_is_demanded_of_what_is_loaded_again(opened, desk, images, monkeypatch, tmp_path, run):
    client = opened("a")
    assert run("sign", "--new-key", tmp_path / "key.pem")[0] == 0
    [public] = tmp_path.glob("*.pub.pem")
    monkeypatch.setenv(REQUIRED, str(public))
    told = admin(client, "/models/a/load")
    assert (told.status, "not signed" in told.error) == (422, True)
    assert embedded(client, images[0]).status == 200
    assert run("sign", desk / "a.icm", "--key", tmp_path / "key.pem")[0] == 0
    assert admin(client, "/models/a/load").status == 200


def test_models_are_answered_by_name(opened, images, model, other_model, wanted):
    client = opened("a", "b", grpc=True)
    models = {"a": model, "b": other_model}
    texts = ["a cat", "two dogs"]
    assert np.array_equal(vector_of(embedded(client, images[0])), wanted[model.space_id][0])  # unsaid: the first
    for name, each in models.items():
        in_json = json.dumps({"images": base64.b64encode(images[0]).decode(), "model": name})
        for query, kind, body in ((f"?model={name}", "image/png", images[0]), ("", "application/json", in_json)):
            answer = client("POST", f"/v1/embed{query}", body, kind)
            assert answer.json["space_id"] == each.space_id
            assert np.array_equal(vector_of(answer), wanted[each.space_id][0])
        form = client.form("/v1/classify", [("images", "x.png", images[0]), ("model", name), ("top", "9")])
        ranking = form.json["predictions"][0]["ranking"]
        assert {one["label"] for one in ranking} == set(each.classes)
        [row] = each.probabilities([images[0]], batch_size=1)
        assert {one["label"]: one["probability"] for one in ranking} == {
            label: float(one) for label, one in zip(each.classes, row, strict=True)
        }
        assert client("GET", f"/v1/model?model={name}").json["space_id"] == each.space_id
        with openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none") as asking:
            data = asking.embeddings.create(model=name, input=texts).data
            assert np.array_equal(np.float32([one.embedding for one in data]), each.embed_texts(texts))
            assert asking.models.retrieve(name).model_dump()["space_id"] == each.space_id
            assert [one.id for one in asking.models.list()] == ["a", "b"]
        for triton, where in (
            (tritonclient.http, f"127.0.0.1:{client.port}"), (tritonclient.grpc, client.grpc),
        ):  # fmt: skip
            given = triton.InferInput("images", [1], "BYTES")
            given.set_data_from_numpy(np.array(images[:1], dtype=object))
            with triton.InferenceServerClient(where) as asking:
                assert asking.is_model_ready(name)
                got = asking.infer(name, [given])
                assert np.array_equal(got.as_numpy("embedding")[0], wanted[each.space_id][0])
                assert np.array_equal(got.as_numpy("probabilities")[0], row)
                with pytest.raises(InferenceServerException, match="available: a, b"):
                    asking.infer("c", [given])
    assert "available: a, b" in embedded(client, images[0], "?model=c").error
    assert embedded(client, images[0], "?model=c").status == 404
    assert embedded(client, images[0], "?model=").status == 422
    assert client("GET", "/v1/model?model=a&model=b").status == 422


def test_models_are_loaded_and_unloaded_by_triton_s_client(opened, images, other_model, wanted):
    client = opened("a")
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{client.port}") as asking:
        listed = asking.get_model_repository_index(headers=ADMIN)
        assert {one["name"]: one["state"] for one in listed} == {"a": "READY", "c": "UNAVAILABLE"}
        assert msgspec.convert(listed, list[ListedModel])
        asking.load_model("c", headers=ADMIN)
        answer = embedded(client, images[0], "?model=c")
        assert np.array_equal(vector_of(answer), wanted[other_model.space_id][0])
        asking.unload_model("c", headers=ADMIN)
        assert embedded(client, images[0], "?model=c").status == 404
        assert {one["name"] for one in admin(client, "/index", {"ready": True}).json} == {"a"}
        with pytest.raises(InferenceServerException, match="no model is called 'c'"):
            asking.unload_model("c", headers=ADMIN)
    # the first may go as well: requests that name none are not answered by another one instead
    assert admin(client, "/models/c/load").json["replaced"] is False
    assert admin(client, "/models/a/unload").json == {"name": "a", "state": "UNAVAILABLE"}
    told = embedded(client, images[0])
    assert (told.status, "it answers requests that name none; available: c" in told.error) == (404, True)
    assert admin(client, "/models/a/load").status == 200
    assert embedded(client, images[0]).status == 200


def test_a_model_is_unloaded_while_clients_ask_it(opened, images, until, wanted, other_model):
    """Every request is answered right, or refused because there is no such model."""
    client = opened("a", "b")
    service = client.api.models.find("b").service
    with Clients(client, images, "?model=b") as clients:
        clients.go_on(until)
        assert admin(client, "/models/b/unload").status == 200
        assert not service.images._open
        clients.go_on(until)
    answered = [one for one in clients.answers if one[1].status == 200]
    refused = [one for _, one in clients.answers if one.status != 200]
    assert answered
    assert refused
    assert {one.status for one in refused} == {404}
    clients.answers = answered
    assert set(clients.space_ids(wanted)) == {other_model.space_id}


def test_who_may_load(opened):
    client = opened("a", api_keys=("ordinary",))
    for path in ("/index", "/models/a/load", "/models/a/unload", "/models/c/load"):
        nobody = admin(client, path, headers={})
        assert (nobody.status, "this needs a key" in nobody.error) == (401, True)
        assert admin(client, path, headers={"x-api-key": "wrong"}).status == 401
        ordinary = admin(client, path, headers={"x-api-key": "ordinary"})
        assert (ordinary.status, "--admin-key-file" in ordinary.error) == (403, True)
        page = admin(client, path, headers={**ADMIN, "origin": "http://elsewhere.example"})
        assert page.status == 403
    assert admin(client, "/index", headers={"x-api-key": "root"}).status == 200
    assert client("GET", "/v1/models", headers=ADMIN).status == 401  # it opens nothing else
    text = client("GET", "/metrics", headers={"x-api-key": "ordinary"}).body.decode()
    assert 'invariclip_refused_total{reason="key"}' in text


def test_nobody_loads_where_there_is_no_admin_key(model, serving):
    with serving(Service(model), api_keys=("ordinary",)) as client:
        for headers in ({}, ADMIN, {"x-api-key": "ordinary"}, {"authorization": "Bearer "}):
            told = admin(client, "/models/a/load", headers=headers)
            assert (told.status, "--admin-key-file" in told.error) == (403, True)


def test_paths_stay_in_the_folder(opened, desk):
    client = opened("a")
    shutil.copytree(desk / "b.icm", desk / "root" / "nested" / "d.icm")
    os.symlink(desk / "b.icm", desk / "root" / "out.icm")
    os.symlink(desk / "root" / "c.icm", desk / "root" / "in.icm")
    for name in ("..%2Fb", "%2e%2e%2fb", "nested%2Fd", "b", str(desk / "b").replace("/", "%2F"), ".", "c.icm", "%00"):
        told = admin(client, f"/models/{name}/load")
        assert told.status == 404, name
    told = admin(client, "/models/out/load")
    assert (told.status, "leads out of" in told.error) == (422, True)
    assert client.api.models.names == ("a",)
    assert admin(client, "/models/in/load").status == 200


def test_what_a_body_may_say(opened):
    client = opened("a")
    for path, body, status in (
        ("/models/a/load", {"parameters": {"config": "{}"}}, 422),
        ("/models/a/load", {"more": 1}, 422),
        ("/models/a/load", {"parameters": {}}, 200),
        ("/models/a/unload", {"parameters": {"unload_dependents": 1}}, 422),
        ("/index", {"ready": "yes"}, 422),
    ):
        told = admin(client, path, body)
        assert told.status == status, (path, body, told.body)
    assert client("POST", f"{ROUTE}/index", b"{", "application/json", ADMIN).status == 400
    assert client("POST", f"{ROUTE}/index", b" " * 70_000, "application/json", ADMIN).status == 413
    assert client("POST", f"{ROUTE}/index?ready=true", None, None, ADMIN).status == 422


def test_no_more_models_than_may_be(opened, desk):
    client = opened("a", most=1)
    told = admin(client, "/models/c/load")
    assert (told.status, "unload one first" in told.error) == (422, True)
    assert admin(client, "/models/a/load").status == 200  # it takes its own place
    with pytest.raises(InputError, match="more than --max-models 1"):
        opened("a", "b", most=1)
    with pytest.raises(InputError, match="no such folder"):
        ModelRepository(client.api.models, Service, {}, roots=[desk / "nothing"])


def test_metrics_name_what_is_loaded_alone(opened, model, images):
    client = opened("a")
    for number in range(9):
        embedded(client, images[0], f"?model=made-up-{number}")
        admin(client, f"/models/made-up-{number}/load")
    admin(client, "/models/c/load")
    text = client("GET", "/metrics").body.decode()
    names = {line.split('name="')[1].split('"')[0] for line in text.splitlines() if 'name="' in line}
    assert names == {"a", "c"}
    assert "made-up" not in text
    assert 'invariclip_model_requests_in_flight{name="a"} 0.0' in text
    assert 'route="/v2/repository",status="404"' in text
    admin(client, "/models/c/unload")
    assert 'name="c"' not in client("GET", "/metrics").body.decode()


def test_measured_sites_go_on_where_the_space_is_the_same(opened, desk, images, other_artifact, run, capsys, until):
    client = opened("a", adapt=LiveSiteOptions(window=SiteWindow(floor=2, step=2, block=2, blocks=8), log=desk / "log"))
    for image in images:
        assert client.classify(image, "?site=yard").status == 200
    shutil.copytree(desk / "a.icm", desk / "before.icm")
    before = client("GET", "/v1/sites/yard").json
    assert before["seen"] == len(images)
    again = admin(client, "/models/a/load")
    assert again.json["sites_ended"] == 0
    assert client("GET", "/v1/sites/yard").json == before
    client.classify(images[0], "?site=yard")
    told = client("GET", "/v1/sites/yard").json
    assert told["seen"] == len(images) + 1
    capsys.readouterr()
    replace(desk / "a.icm", other_artifact)
    assert admin(client, "/models/a/load").json["sites_ended"] == 1
    until(lambda: not client.repository._changing.locked())
    assert "1 measured sites begin anew" in capsys.readouterr().err
    assert client("GET", "/v1/sites/yard").status == 404
    # the log was written on by the second model, and by the third's coming to its end
    log, out = desk / "log" / "key-0" / "yard" / "0001", desk / "yard.safetensors"
    code, _, said = run("adapt", desk / "before.icm", "--replay", log, "-o", out, "--quiet")
    assert code == 0, said
    assert read_site(out).digest == told["sha256"]


def test_names(tmp_path, tiny_artifact, model):
    (tmp_path / "now.icm").symlink_to(tiny_artifact)
    assert name_of(tmp_path / "now.icm") == "now"  # the name stays when the link is turned
    assert name_of(Path(".")) == Path.cwd().name
    service = Service(model)
    try:
        with pytest.raises(InputError, match="two artifacts are called 'tiny'"):
            ServedModels([service, service])
    finally:
        service.close()
