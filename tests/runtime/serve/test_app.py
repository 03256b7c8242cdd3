"""The endpoints over a real connection: answers as the model and `predict` give them, refusals as one line."""

import base64
import json
import os
import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from invariclip.artifact.embeddings import EMBEDDINGS_FILE, read_embeddings
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.tokenizer import hearing_cuts
from invariclip.serve.limits import MIB, Limits
from invariclip.serve.metrics import Metrics
from invariclip.serve.service import Service
from invariclip.version import __version__


@pytest.fixture(scope="module")
def ask(model, serving):
    limits = Limits(body=200_000, images=4, texts=4, classes=5, templates=3, prompts=8, seconds=20)
    with serving(Service(model, limits)) as client:
        yield client


@pytest.fixture(scope="module")
def unsure(unsure_model, serving):
    with serving(Service(unsure_model, abstain_above="calibrated")) as client:
        yield client


def test_classify_says_what_predict_says(ask, run, tiny_artifact, tiny_images, images):
    path = find_images([tiny_images])[0]
    code, out, _ = run("predict", tiny_artifact, path, "--json", "--threads", 1)
    assert code == 0
    told = json.loads(out)
    answer = ask.classify(images[0])
    assert answer.status == 200
    assert answer.json == {
        "space_id": told["space_id"],
        "predictions": [{**told["predictions"][0], "image": "0"}],
        "warnings": [],
    }


def test_images_come_as_a_body_as_files_or_as_base64(ask, images):
    [raw] = ask.classify(images[0], "?top=1").json["predictions"]
    assert len(raw["ranking"]) == 1
    text = base64.b64encode(images[0]).decode()
    answers = [
        ask.form("/v1/classify", [("images", "a.png", images[0]), ("top", "1")]),
        ask.json("/v1/classify", {"images": [{"name": "a.png", "data": text}], "top": 1}),
        ask.form("/v1/classify?top=1", [("images", "a.png", images[0])]),
    ]
    for answer in answers:
        assert answer.json["predictions"] == [{**raw, "image": "a.png"}]
    octets = ask("POST", "/v1/classify?top=1", images[0], "application/octet-stream")
    assert octets.json["predictions"] == [raw]
    several = ask.form("/v1/classify", [("images", f"{n}.png", data) for n, data in enumerate(images[:4])])
    assert [one["image"] for one in several.json["predictions"]] == ["0.png", "1.png", "2.png", "3.png"]


def test_classes_and_templates_of_a_request(ask, model, images):
    other = model.with_classes(["sun", "a moon, full"], ["a sketch of a {}."])
    [alone] = other.classify(images[:1])
    answers = [
        ask.json(
            "/v1/classify",
            {"images": [base64.b64encode(images[0]).decode()], "classes": ["sun", "a moon, full"],
             "templates": "a sketch of a {}."},
        ),
        ask.classify(
            images[0], "?classes=sun&classes=a%20moon,%20full&templates=a%20sketch%20of%20a%20%7B%7D."
        ),
    ]  # fmt: skip
    for answer in answers:
        assert answer.json["predictions"] == [{"image": "0", **alone.to_json()}]
    cut = ask.classify(images[0], f"?classes={'word%20' * 30},sun").json["warnings"]
    assert len(cut) == 1
    assert "cut to context_length 16" in cut[0]


def test_uncertainty_and_abstaining(unsure, unsure_model, images):
    [alone] = unsure_model.classify(images[:1], abstain_above="calibrated")
    assert alone.abstained  # random weights are sure of nothing
    default = unsure.classify(images[0]).json["predictions"]
    assert default == [{"image": "0", **alone.to_json()}]
    assert default[0]["label"] is None
    assert default[0]["uncertainty"] > 0.3
    never = unsure.json("/v1/classify", {"images": [base64.b64encode(images[0]).decode()], "abstain_above": None})
    assert never.json["predictions"][0]["label"] == alone.ranking[0][0]
    for query, abstained in (("?abstain_above=1", False), ("?abstain_above=0", True)):
        assert unsure.classify(images[0], query).json["predictions"][0]["abstained"] is abstained
    other = unsure.classify(images[0], "?classes=sun,moon").json["predictions"][0]
    [swapped] = unsure_model.with_classes(["sun", "moon"]).classify(images[:1], abstain_above=0.3)
    assert other == {"image": "0", **swapped.to_json()}
    assert unsure.classify(images[0], "?abstain_above=2").status == 422
    # The server's threshold is of the evidence: an energy is not held against it
    for query, whose in (("", unsure_model), ("&classes=sun,moon", unsure_model.with_classes(["sun", "moon"]))):
        [energy] = whose.classify(images[:1], uncertainty="energy")
        told = unsure.classify(images[0], f"?uncertainty=energy{query}").json["predictions"][0]
        assert told == {"image": "0", **energy.to_json()}
        assert (told["uncertainty_kind"], told["abstained"]) == ("energy", False)


def test_embed(ask, model, images, tmp_path):
    texts = ["a cat", "word " * 30]
    with hearing_cuts():
        wanted = model.embed_texts(texts)
    told = ask.json("/v1/embed", {"texts": texts})
    assert told.status == 200
    assert told.json["space_id"] == model.space_id
    assert told.json["items"] == texts
    assert len(told.json["warnings"]) == 1
    np.testing.assert_array_equal(np.float32(told.json["embeddings"]), wanted)
    image = ask("POST", "/v1/embed", images[0], "image/png").json
    assert image["width"] == 8
    np.testing.assert_array_equal(np.float32(image["embeddings"]), model.embed_images(images[:1]))
    file = ask(
        "POST", "/v1/embed", json.dumps({"texts": texts}), "application/json",
        headers={"accept": "application/octet-stream"},
    )  # fmt: skip
    assert file.headers["content-type"] == "application/octet-stream"
    assert file.headers["x-space-id"] == model.space_id
    path = tmp_path / "texts.safetensors"
    path.write_bytes(file.body)
    read = read_embeddings(path)
    assert (read.items, read.space_id) == (tuple(texts), model.space_id)
    np.testing.assert_array_equal(read.vectors, wanted)
    assert len(EMBEDDINGS_FILE.from_bytes(file.body, "x")[1].warnings) == 1


def test_the_model_says_what_it_is(ask, unsure, model):
    told = ask("GET", "/v1/model").json
    assert told["classes"] == ["cat", "dog", "tree"]
    assert told["space_id"] == model.space_id
    assert told["variant"] == "float32"
    assert told["engine"]["engine"] == "onnxruntime"
    assert told["parity"] == model.manifest.variants["float32"].parity["onnxruntime"]
    assert told["semantics"] is None
    assert told["limits"]["images"] == 4
    learned = unsure("GET", "/v1/model").json
    assert learned["semantics"]["learned"] == 2
    assert learned["abstain_above"] == 0.3


def test_health_and_readiness(ask):
    assert ask("GET", "/healthz").json == {"status": "alive"}
    assert ask("GET", "/readyz").json == {"status": "ready"}
    ask.api.ready = False
    try:
        cold = ask("GET", "/readyz")
        assert (cold.status, cold.headers["retry-after"]) == (503, "1")
        assert "warming up" in cold.error
        assert ask("GET", "/healthz").status == 200
    finally:
        ask.api.ready = True


def test_metrics(model, serving, images):
    metrics = Metrics()
    with serving(Service(model, images=metrics.watcher("images")), metrics) as ask:
        ask.classify(images[0])
        ask.classify(b"nothing")
        ask("GET", "/nowhere/1")
        text = ask("GET", "/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in text.body.decode().splitlines() if not line.startswith("#"))
    counts = {name: float(value) for name, value in lines.items()}
    assert counts['invariclip_requests_total{route="/v1/classify",status="200"}'] == 1
    assert counts['invariclip_requests_total{route="/v1/classify",status="422"}'] == 1
    assert counts['invariclip_requests_total{route="other",status="404"}'] == 1
    assert counts['invariclip_items_total{kind="images"}'] == 1
    assert counts['invariclip_batch_size_count{kind="images"}'] == 1
    assert counts['invariclip_queue_depth{kind="images"}'] == 0
    for stage in ("queue", "engine"):
        assert counts[f'invariclip_request_stage_seconds_count{{route="/v1/classify",stage="{stage}"}}'] == 1
    assert counts['invariclip_requests_in_flight{route="/v1/classify"}'] == 0
    assert counts['invariclip_requests_in_flight{route="/metrics"}'] == 1
    assert counts['invariclip_refused_total{reason="input"}'] == 1
    assert counts['invariclip_refused_total{reason="pixels"}'] == 0
    [info] = [name for name in counts if name.startswith("invariclip_build_info")]
    for name, value in (
        ("version", __version__), ("model", model.manifest.model.name), ("variant", "float32"),
        ("engine", "onnxruntime"), ("space_id", model.space_id),
    ):  # fmt: skip
        assert f'{name}="{value}"' in info
    for stage in ("decode", "queue", "engine"):
        assert counts[f'invariclip_stage_seconds_count{{kind="images",stage="{stage}"}}'] == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_metrics_of_the_process_are_the_system_s(ask):
    lines = ask("GET", "/metrics").body.decode().splitlines()
    told = dict(line.rsplit(" ", 1) for line in lines if line.startswith("process_"))
    seconds, resident, began, opened = (
        float(told[f"process_{name}"])
        for name in ("cpu_seconds_total", "resident_memory_bytes", "start_time_seconds", "open_fds")
    )
    times, pages = os.times(), int(Path("/proc/self/statm").read_text().split()[1])
    assert 0 < seconds <= times.user + times.system + 0.1
    assert time.time() - began >= seconds / (2 * (os.cpu_count() or 1))
    assert resident == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.2)
    assert abs(opened - len(os.listdir("/proc/self/fd"))) < 8


def test_labels_are_bounded_whatever_clients_send(model, serving):
    metrics = Metrics()
    with serving(Service(model), metrics) as ask:
        for number in range(30):
            ask("GET", f"/nowhere/{number}")
            ask("POST", f"/v1/sites/{number}/freeze")
            ask(f"METHOD{number}", "/v1/model")
        text = metrics.text().decode()
    routes = set(re.findall(r'route="([^"]*)"', text))
    assert routes == {"other", "/v1/sites", "/v1/model"}
    assert "METHOD" not in text


def test_the_page_needs_nothing_from_elsewhere(ask):
    page = ask("GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    text = page.body.decode()
    assert "http://" not in text
    assert "https://" not in text
    assert "//" not in "".join(line.split("src=")[1] for line in text.splitlines() if "src=" in line)


@pytest.mark.parametrize(
    ("method", "path", "body", "kind", "status", "reason"),
    [
        ("GET", "/nowhere", None, None, 404, "nothing is at /nowhere; available: POST /v1/classify"),
        ("GET", "/v1/classify", None, None, 405, "GET is not taken here; available: POST"),
        ("POST", "/v1/model", b"", None, 405, "available: GET"),
        ("POST", "/v1/classify", b"x", "text/plain", 415, "'text/plain' is not taken; available: image/"),
        ("POST", "/v1/classify", b"x", None, 415, "the header is content-type"),
        ("POST", "/v1/classify", b"{", "application/json", 400, "not readable as JSON"),
        ("POST", "/v1/classify", b"[]", "application/json", 400, "must be a JSON object"),
        ("POST", "/v1/classify", b"x", "multipart/form-data", 400, "Missing boundary"),
        ("POST", "/v1/classify", b"x", "multipart/form-data; boundary=b", 400, "Invalid multipart data"),
        ("POST", "/v1/classify", b"", "image/png", 422, "no image; send one"),
        ("POST", "/v1/classify", b"nothing", "image/png", 422, "image 0: not an image of a known format: AVIF, BMP"),
        ("POST", "/v1/classify?tpo=2", b"nothing", "image/png", 422, "no field is called 'tpo'"),
        ("POST", "/v1/classify?uncertainty=evidence", b"x", "image/png", 422, "has no learned templates"),
        ("POST", "/v1/classify?uncertainty=doubt", b"x", "image/png", 422, "one of evidence, energy, not 'doubt'"),
        ("POST", "/v1/classify?abstain_above=calibrated", b"x", "image/png", 422, "energy is not; give a number"),
        ("POST", "/v1/classify?classes=a,b,c,d,e,f", b"x", "image/png", 413, "6 classes are too many; up to 5"),
        ("POST", "/v1/classify", b"x" * 200_001, "image/png", 413, "up to 200,000 bytes"),
        ("POST", "/v1/embed", b'{"texts": ["a"], "images": ["aGk="]}', "application/json", 422, "not both"),
        ("POST", "/v1/embed", b'{"texts": ["a", "b", "c", "d", "e"]}', "application/json", 413, "5 texts are too many"),
    ],
)  # fmt: skip
def test_refusals(ask, method, path, body, kind, status, reason):
    answer = ask(method, path, body, kind)
    assert answer.status == status
    assert reason in answer.error


def test_compressed_bodies_are_refused_and_not_misread(ask, images):
    answer = ask.classify(images[0], headers={"content-encoding": "gzip"})
    assert answer.status == 415
    assert "'gzip' is not taken" in answer.error


def test_too_many_files_and_files_in_other_fields(ask, images):
    five = ask.form("/v1/classify", [("images", f"{n}.png", images[0]) for n in range(5)])
    assert (five.status, five.error) == (413, "too many images; up to 4 are taken at once")
    other = ask.form("/v1/classify", [("file", "a.png", images[0])])
    assert other.status == 422
    assert "belongs in the field images, not in 'file'" in other.error


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), path=st.sampled_from(["/v1/classify", "/v1/embed"]))
def test_a_form_that_is_cut_anywhere_is_refused(ask, images, data, path):
    part = b'--b\r\ncontent-disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
    whole = (part + images[0] + b"\r\n") * 2 + b"--b--\r\n"
    last = len(whole) - len(b"--\r\n")
    cut = whole[: data.draw(st.one_of(st.integers(0, last + 1), st.integers(len(part + images[0]), last + 1)))]
    answer = ask("POST", path, cut, "multipart/form-data; boundary=b")
    assert answer.status == 400
    assert "closing boundary" in answer.error
    assert ask("POST", path, whole.rstrip(), "multipart/form-data; boundary=b").status == 200
    assert ask.api.exchange.held.now == 0


def test_a_body_without_a_length_is_counted_while_it_comes(ask):
    link = ask.connection()
    link.request("POST", "/v1/classify", (b"x" * 50_000 for _ in range(5)), {"content-type": "image/png"})
    answer = link.getresponse()
    assert answer.status == 413
    assert "up to 200,000 bytes" in json.loads(answer.read())["error"]
    link.close()
    assert ask.api.exchange.held.now == 0


def test_a_bad_image_fails_its_own_request_alone(ask, images):
    bad = ask.form("/v1/classify", [("images", "good.png", images[0]), ("images", "bad.png", b"nothing")])
    assert bad.status == 422
    assert bad.error.startswith("image bad.png: not an image of a known format: AVIF, BMP")
    assert ask.classify(images[0]).status == 200


def test_images_of_a_request_are_weighed_by_their_heads(model, serving, encoded, images):
    with serving(Service(model, Limits(pixels=8_000, request_pixels=20_000))) as ask:
        large = encoded((80, 100))
        assert ask.classify(large).status == 200
        refused = ask.form("/v1/classify", [("images", f"{place}.png", large) for place in range(3)])
        assert refused.status == 413
        assert refused.error.endswith("up to 20,000 are taken at once: send fewer or smaller ones")
        in_json = ask.json("/v1/embed", {"images": [base64.b64encode(large).decode()] * 3})
        assert (in_json.status, in_json.error) == (413, refused.error)
        strip = ask.classify(encoded((1, 7000)))
        assert strip.status == 413
        assert strip.error.startswith(
            "the images of the request have 7,175,000 pixels, decoded and resized; up to 20,000"
        )


def test_answers_are_bounded_before_anything_is_worked_on(model, serving, images):
    service = Service(model, Limits(answer=MIB))
    with serving(service) as ask:
        names = [f"{'x' * 1990}{number:04d}" for number in range(600)]
        asked = {"images": [base64.b64encode(images[0]).decode()], "classes": names, "top": 600}
        refused = ask.json("/v1/classify", asked)
        assert refused.status == 413
        assert "top 600 of 600 classes for each image may take 1," in refused.error
        assert service.class_sets.embedded == 0
        fits = int(refused.error.rpartition(" ")[2])
        answer = ask.json("/v1/classify", {**asked, "top": fits})
        assert len(answer.json["predictions"][0]["ranking"]) == fits
        assert len(json.dumps(answer.json["predictions"])) <= MIB
    with serving(Service(model, Limits(answer=24 * model.width))) as ask:
        refused = ask.json("/v1/embed", {"texts": ["a", "b"]})
        assert refused.status == 413
        assert refused.error.startswith(
            f"2 embeddings of width {model.width} may take {48 * model.width:,} bytes in JSON"
        )
        assert ask.json("/v1/embed", {"texts": ["a"]}).status == 200
        body = json.dumps({"texts": ["a", "b"]})
        file = ask("POST", "/v1/embed", body, "application/json", {"accept": "application/octet-stream"})
        assert file.status == 200


def test_large_answers_are_written_beside_the_event_loop_and_counted(model, serving, images, monkeypatch):
    texts, names = ([f"{what} {number}" for number in range(1000)] for what in ("text", "class"))
    monkeypatch.setattr("invariclip.serve.app.INLINE", 1000)
    with serving(Service(model)) as ask:
        answer = ask.json("/v1/embed", {"texts": texts})
        assert answer.json["items"] == texts
        np.testing.assert_allclose(answer.json["embeddings"], model.embed_texts(texts), atol=1e-5)
        asked = {"images": [base64.b64encode(data).decode() for data in images[:11]], "classes": names, "top": 1000}
        told = ask.json("/v1/classify", asked).json["predictions"]
        alone = model.with_classes(names).classify(images[:11], top_k=1000)
        assert [one["label"] for one in told] == [one.label for one in alone]
        assert all(len(one["ranking"]) == 1000 for one in told)
        assert ask.api.exchange.sent.now == 0


@pytest.mark.parametrize(
    ("side", "status", "reason"),
    [
        (9_000, 413, "image 0: 9000x9000 pixels are too many; up to 50,000,000"),
        (60_000, 413, "image 0: Image size (3600000000 pixels) exceeds limit of"),
    ],
)
def test_a_bomb_is_refused_by_its_head(ask, encoded, side, status, reason):
    bomb = bytearray(encoded((8, 8)))
    bomb[16:24] = struct.pack(">II", side, side)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    answer = ask.classify(bytes(bomb))
    assert answer.status == status
    assert reason in answer.error


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b'{"images": [{"name": "\\ud800", "data": "%s"}]}', 400, "not readable as JSON"),
        (b'{"images": "%s", "top": 1, "top": 2}', 400, "'top' stands twice in one object"),
        (b'{"images": "%s", "top": 1000000000}', 422, "top must be a whole number from 1 to 999,999,999"),
        (
            b'{"images": "%s", ' + b",".join(b'"k%d": 1' % n for n in range(6000)) + b"}",
            413,
            "too many names and values",
        ),
    ],
    ids=["surrogate", "twice", "top", "values"],
)
def test_json_that_is_refused(ask, images, body, status, reason):
    answer = ask("POST", "/v1/classify", body % base64.b64encode(images[0]), "application/json")
    assert answer.status == status
    assert reason in answer.error


def test_half_a_character_in_the_name_of_a_file_is_refused(ask, images):
    body = (
        b'--b\r\ncontent-disposition: form-data; name="images"; filename="\\ud800"\r\n\r\n'
        + images[0]
        + b"\r\n--b--\r\n"
    )
    answer = ask("POST", "/v1/embed", body, "multipart/form-data; boundary=b; charset=unicode_escape")
    assert answer.status == 422
    assert "an image's name must be Unicode" in answer.error


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=300),
    kind=st.sampled_from(
        ["image/png", "application/json", "multipart/form-data; boundary=b",
         "multipart/form-data; boundary=b; charset=idna", "application/octet-stream", ""]
    ),
    prefix=st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b'{"images": "', b"--b\r\n",
         b'--b\r\ncontent-disposition: form-data; name="images"; filename="a"\r\n\r\n']
    ),
    path=st.sampled_from(["/v1/classify", "/v1/embed"]),
    query=st.text(st.sampled_from("abtopclassestemplates=&%{}0123456789é "), max_size=20),
)  # fmt: skip
def test_random_bytes_never_break_the_server(ask, body, kind, prefix, path, query):
    from urllib.parse import quote

    answer = ask("POST", f"{path}?{quote(query, safe='=&%{}')}".replace(" ", "+"), prefix + body, kind)
    assert answer.status in (200, 400, 413, 415, 422)
    assert answer.status == 200 or answer.error
