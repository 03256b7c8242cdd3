"""Sites over HTTP: named ones, running ones that requests move, each key's own, and what may not be asked."""

import base64
import json
import sys
import threading

import numpy as np
import pytest

from invariclip.artifact.embeddings import read_embeddings
from invariclip.cli.main import main
from invariclip.errors import InputError, SiteError
from invariclip.serve.metrics import Metrics
from invariclip.serve.service import Service
from invariclip.serve.sites import LiveSiteOptions, SiteRegistry, read_sites
from invariclip.sites.live_site import SiteWindow
from invariclip.sites.measuring import begun, training_mean
from invariclip.sites.site import new_site, read_site, write_site

SMALL = SiteWindow(floor=2, step=2, block=2, blocks=8)


@pytest.fixture(scope="module")
def site(model, images):
    """A place that moves embeddings far, as if there were more kinds of things than a random model can tell."""
    bank = np.eye(model.width)
    empty = new_site("yard", model.space_id, np.full(model.width, 0.05), len(bank), {})
    return empty.adding(model.embed_images(images), bank)


def _service(model, warm=True, **how):
    service = Service(model, sites=SiteRegistry(model, **how))
    if warm:
        service.warm_up()
    return service


def _as_file(client, path, body, kind, **more):
    return client("POST", path, body, kind, headers={"accept": "application/octet-stream", **more})


def test_the_default_site_is_in_every_answer(model, site, serving, images, tmp_path):
    adapted = model.with_site(site)
    with serving(_service(model, default=site)) as client:
        [wanted] = adapted.classify(images[:1], top_k=3)
        told = client.classify(images[0], "?top=3").json
        assert told["predictions"] == [{"image": "0", **wanted.to_json()}]
        assert told["site"] == {"name": "yard", "sha256": site.digest, "images": site.images}
        [other] = adapted.with_classes(["sun", "moon"]).classify(images[:1], top_k=2)
        told = client.classify(images[0], "?top=2&classes=sun,moon").json["predictions"][0]
        assert told == {"image": "0", **other.to_json()}
        # "" asks for none
        [plain] = model.classify(images[:1], top_k=3)
        told = client.classify(images[0], "?top=3&site=").json
        assert (told["predictions"], told["site"]) == ([{"image": "0", **plain.to_json()}], None)
        assert client("GET", "/v1/model").json["site_sha256"] == site.digest
        for body, kind, of in ((images[0], "image/png", site.digest), (b'{"texts": ["a"]}', "application/json", "")):
            (tmp_path / "e.safetensors").write_bytes(_as_file(client, "/v1/embed", body, kind).body)
            assert read_embeddings(tmp_path / "e.safetensors").site_sha256 == of


def test_requests_name_their_sites(model, site, serving, images, tmp_path):
    (tmp_path / "sites").mkdir()
    write_site(tmp_path / "sites" / "yard.safetensors", site)
    write_site(tmp_path / "sites" / "hall.safetensors", begun(model, "hall", site.training_mean, None))
    with serving(_service(model, known=read_sites(tmp_path / "sites"))) as client:
        [wanted] = model.with_site(site).classify(images[:1])
        image = base64.b64encode(images[0]).decode()
        for answer in (
            client.classify(images[0], "?site=yard&top=5"),
            client.json("/v1/classify", {"images": [image], "site": "yard", "top": 5}),
            client.form("/v1/classify", [("images", "0", images[0]), ("site", "yard"), ("top", "5")]),
        ):
            assert answer.json["predictions"] == [{"image": "0", **wanted.to_json()}]
        [plain] = model.classify(images[:1])
        for body in ({"images": [image], "top": 5}, {"images": [image], "top": 5, "site": None}):
            told = client.json("/v1/classify", body).json
            assert told["predictions"] == [{"image": "0", **plain.to_json()}]
        assert client("GET", "/v1/model").json["sites"] == ["hall", "yard"]
        assert [one["name"] for one in client("GET", "/v1/sites").json["sites"]] == ["hall", "yard"]
        file = client("GET", "/v1/sites/yard", headers={"accept": "application/octet-stream"})
        (tmp_path / "again.safetensors").write_bytes(file.body)
        assert read_site(tmp_path / "again.safetensors").digest == site.digest
        for answer, status, said in (
            (client.classify(images[0], "?site=barn"), 422, "available: hall, yard"),
            (client.json("/v1/classify", {"images": [image], "site": 3}), 422, "one name"),
            (client.classify(images[0], "?site=yard&site=hall"), 422, "one name"),
            (client.json("/v1/embed", {"texts": ["a"], "site": "yard"}), 422, "embeddings alone"),
            (client("GET", "/v1/sites/barn"), 404, "no site"),
            (client("POST", "/v1/sites/yard/freeze"), 404, "this key"),
        ):
            assert answer.status == status
            assert said in answer.error


@pytest.fixture
def running(model, serving, tmp_path):
    """A server that measures, with two keys and two sites for each."""
    sites = SiteRegistry(model, running=LiveSiteOptions(4, SMALL, tmp_path / "log"), keys=2)
    metrics = Metrics()
    service = Service(model, sites=sites)
    service.warm_up()
    with serving(service, metrics, api_keys=("one", "two")) as client:
        yield client


def _key(name):
    return {"x-api-key": name}


def test_what_a_key_shows_moves_its_own_site_alone(running, model, images, tmp_path):
    for image in images[:6]:
        running.classify(image, "?site=yard", headers=_key("one"))
    first = running("GET", "/v1/sites/yard", headers=_key("one")).json
    assert (first["seen"], first["live"], first["frozen"]) == (6, True, False)
    assert first["images"] > 0
    assert running("GET", "/v1/sites/yard", headers=_key("two")).status == 404
    told = running.classify(images[0], "?site=yard", headers=_key("two")).json
    assert told["site"]["images"] == 0
    [plain] = model.classify(images[:1], top_k=3)
    ranking = {one["label"]: one["probability"] for one in told["predictions"][0]["ranking"]}
    assert ranking == pytest.approx(dict(plain.ranking), abs=1e-5)
    # what the site knows is what the library measures from the same images in the same order
    file = running("GET", "/v1/sites/yard", headers={**_key("one"), "accept": "application/octet-stream"})
    (tmp_path / "yard.safetensors").write_bytes(file.body)
    site = read_site(tmp_path / "yard.safetensors")
    assert site.digest == first["sha256"]
    text = running("GET", "/metrics", headers=_key("one")).body.decode()
    assert 'invariclip_site_seen_total{key="1",site="yard"} 6.0' in text
    assert 'invariclip_site_seen_total{key="2",site="yard"} 1.0' in text


def test_an_answer_is_of_what_was_known_before_it(running, model, images):
    for image in images[:4]:
        running.classify(image, "?site=yard", headers=_key("one"))
    live = {key: one for key, one in running.api.models.find(None).service.sites.live()}[1]  # noqa: C416
    before = live.site
    told = running.classify(images[5], "?site=yard&top=3", headers=_key("one")).json
    [wanted] = model.with_site(before).classify(images[5:6], top_k=3)
    assert told["site"]["sha256"] == before.digest
    assert told["predictions"] == [{"image": "0", **wanted.to_json()}]


def test_a_key_has_its_share_of_sites(running, images):
    for name in ("a", "b"):
        assert running.classify(images[0], f"?site={name}", headers=_key("one")).status == 200
    third = running.classify(images[0], "?site=c", headers=_key("one"))
    assert third.status == 429
    assert "--max-sites" in third.error
    assert running.classify(images[0], "?site=c", headers=_key("two")).status == 200
    listed = running("GET", "/v1/sites", headers=_key("two")).json
    assert ([one["name"] for one in listed["sites"]], listed["share"]) == (["c"], 2)
    for name in ("../up", "a/b", "x" * 65, ".hidden", "a%0Ab"):
        assert running.classify(images[0], f"?site={name}", headers=_key("two")).status == 422


def test_sites_are_frozen_thawed_and_reset(running, images):
    ask = lambda verb: running("POST", f"/v1/sites/yard/{verb}", headers=_key("one"))  # noqa: E731
    for image in images[:4]:
        running.classify(image, "?site=yard", headers=_key("one"))
    frozen = ask("freeze").json
    assert frozen["frozen"]
    running.classify(images[5], "?site=yard", headers=_key("one"))
    assert running("GET", "/v1/sites/yard", headers=_key("one")).json["sha256"] == frozen["sha256"]
    assert not ask("thaw").json["frozen"]
    assert ask("reset").json["images"] == 0
    assert ask("melt").status == 422
    assert running("GET", "/v1/sites/yard/reset", headers=_key("one")).status == 405


def test_a_log_is_replayed_to_the_same_bits(running, tiny_artifact, images, tmp_path, capsys):
    threads = [
        threading.Thread(target=running.classify, args=(image, "?site=yard"), kwargs={"headers": _key("one")})
        for image in images
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = running("GET", "/v1/sites/yard", headers=_key("one")).json["sha256"]
    running.api.models.find(None).service.close()
    out = tmp_path / "yard.safetensors"
    with pytest.raises(SystemExit) as end:
        main(["adapt", str(tiny_artifact), "--replay", str(tmp_path / "log" / "key-1" / "yard" / "0001"), "-o",
              str(out), "--quiet"])  # fmt: skip
    assert end.value.code == 0
    assert read_site(out).digest == wanted


def test_what_a_killed_server_left_of_a_log_is_removed_by_the_next(running, images, tmp_path):
    earlier = tmp_path / "log" / "key-1" / "yard" / "0001"
    earlier.mkdir(parents=True)
    (earlier / ".log.json.unfinished").write_text("half")
    (earlier / "start.safetensors").write_text("kept")
    running.classify(images[0], "?site=yard", headers=_key("one"))
    assert [path.name for path in earlier.iterdir()] == ["start.safetensors"]
    assert (earlier.parent / "0002" / "log.json").exists()


def test_a_site_that_is_known_is_where_measuring_starts(model, serving, tiny_artifact, images):
    mean = training_mean(tiny_artifact, model.manifest)
    known = begun(model, "yard", mean, None).adding(model.embed_images(images), model.class_bank())
    service = _service(model, known={"yard": known}, running=LiveSiteOptions(window=SMALL))
    with serving(service) as client:
        assert client.classify(images[0], "?site=yard").json["site"]["sha256"] == known.digest
        assert client.classify(images[0], "?site=other").json["site"]["images"] == 0


def test_before_it_is_warm_no_site_is_answered(model, site, serving, images):
    with serving(_service(model, warm=False, default=site, running=LiveSiteOptions())) as client:
        for query in ("", "?site=new"):
            answer = client.classify(images[0], query)
            assert answer.status == 503
            assert answer.headers["retry-after"] == "1"


def test_sites_that_cannot_be_are_refused(model, unsure_model, site, tmp_path):
    with pytest.raises(InputError, match="without --cdc"):
        SiteRegistry(unsure_model, default=site)
    other = new_site("there", "0" * 32, site.training_mean, 3, {})
    with pytest.raises(SiteError, match="measure it again"):
        SiteRegistry(model, known={"there": other})
    with pytest.raises(SiteError, match="other classes"):
        SiteRegistry(model, known={"yard": site}, running=LiveSiteOptions())
    with pytest.raises(InputError, match="registry's default"):
        Service(model.with_site(site))
    with pytest.raises(InputError, match="no such folder"):
        read_sites(tmp_path / "none")
    with pytest.raises(InputError, match="holds no site"):
        read_sites(tmp_path)
    (tmp_path / "a b.safetensors").write_bytes(json.dumps({}).encode())
    with pytest.raises(InputError, match="a site's name"):
        read_sites(tmp_path)


def test_a_log_that_cannot_be_written_fails_no_request(model, serving, images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        SiteRegistry(model, running=LiveSiteOptions(log=tmp_path / "file"))
    log = tmp_path / "log"
    with serving(_service(model, running=LiveSiteOptions(4, SMALL, log))) as client:
        log.mkdir()
        (log / "key-0").write_text("in the way")
        assert client.classify(images[0], "?site=yard").status == 200
        assert client("GET", "/v1/sites/yard").json["seen"] == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "not logged" in line


def test_logs_that_were_cleared_away_are_not_written_again(model, serving, images, tmp_path):
    kept = tmp_path / "key-0" / "yard" / "0007"
    kept.mkdir(parents=True)
    with serving(_service(model, running=LiveSiteOptions(4, SMALL, tmp_path))) as client:
        assert client.classify(images[0], "?site=yard").status == 200
    assert sorted(path.name for path in kept.parent.iterdir()) == ["0007", "0008"]
    assert not list(kept.iterdir())


def test_sites_are_listed_while_others_begin(model):
    sites = SiteRegistry(model, running=LiveSiteOptions(400))
    sites.prepare(model.hosting())
    before, failed = sys.getswitchinterval(), []

    def listing():
        try:
            while len(sites._live) < 400:
                sites.listed(0)
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=listing)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for number in range(400):
            sites.find(f"s{number}", 0)
        thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed


def test_known_sites_are_called_as_requests_name_them(model, serving, site, images, tmp_path):
    known = begun(model, "\udce9", site.training_mean, None)
    for name in ("hall", "yard"):  # a copied file says the same name
        write_site(tmp_path / f"{name}.safetensors", known)
    service = _service(model, known=read_sites(tmp_path), running=LiveSiteOptions(4, SMALL))
    with serving(service) as client:
        for name in ("hall", "yard"):
            assert client.classify(images[0], f"?site={name}").json["site"]["name"] == name
        assert [one["name"] for one in client("GET", "/v1/sites").json["sites"]] == ["hall", "yard"]
        text = client("GET", "/metrics").body.decode()
        assert all(f'invariclip_site_seen_total{{key="0",site="{name}"}} 1.0' in text for name in ("hall", "yard"))


def test_more_keys_than_sites_are_refused(model):
    with pytest.raises(InputError, match="--max-sites"):
        SiteRegistry(model, running=LiveSiteOptions(2), keys=3)


def test_a_request_that_is_refused_begins_no_site(running, images):
    for query in ("&uncertainty=evidence", "&abstain_above=2", "&classes=a,a&templates=x"):
        assert running.classify(images[0], f"?site=a{query}", headers=_key("one")).status == 422
    assert running("GET", "/v1/sites", headers=_key("one")).json["sites"] == []


def test_an_error_lists_a_few_of_many_sites(model, site):
    sites = SiteRegistry(model, known={f"yard{number}": site for number in range(1000)})
    with pytest.raises(InputError, match=r"available: yard0, yard1, .* \.\.\.$") as refused:
        sites.find("barn", 0)
    assert len(str(refused.value)) < 300
