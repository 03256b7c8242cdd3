"""The machine profile: what it rests on, what makes it stale, that no damage gets past it; and what `load` opens."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import invariclip
from invariclip import machine
from invariclip.artifact.folder import read_manifest, write_manifest
from invariclip.backends import engine_versions
from invariclip.errors import ArtifactError, InputError, ProfileError, ProfileWarning
from invariclip.machine import Machine, available_memory, load_before, parse_cpuinfo, this_machine
from invariclip.profile import (
    MAX_PROFILE_BYTES,
    MachineProfile,
    Measurement,
    ProfileChoice,
    changes,
    file_key,
    profile_path,
    read_profile,
    write_profile,
)
from invariclip.records import seal, sealed_json
from invariclip.selection import basis_of, choose, safe_default

ORT = "onnxruntime"


@pytest.fixture(scope="module")
def copied(tiny_artifact, tmp_path_factory):
    """An artifact with a second variant `same` beside `float32`, both proved on both engines."""
    folder = tmp_path_factory.mktemp("profiles") / "p.icm"
    shutil.copytree(tiny_artifact, folder)
    manifest = read_manifest(folder)
    record = manifest.variants["float32"].parity[ORT]
    variant = replace(manifest.variants["float32"], parity={ORT: record, "openvino": record})
    near = replace(variant, parity={ORT: {**record, "fidelity": ["near", "fast"]}})
    write_manifest(folder, replace(manifest, variants={"float32": variant, "same": variant, "near": near}))
    return folder


@pytest.fixture
def folder(copied, tmp_path):
    return shutil.copytree(copied, tmp_path / "p.icm")


def made(folder, choice=None, objective="latency", fidelity="exact", date="2026-01-01T00:00:00+00:00", **basis):
    """A profile as `tune` writes it."""
    rests = replace(basis_of(folder, objective, fidelity, (1,), (1,)), **basis)
    picked = choice or ProfileChoice("same", ORT, 1, 1)
    measured = Measurement(picked, "exact", 3, 11, 1.5, 1.4, 1.6, 666.7, 2.0, 1.9, 2.1)
    left_out = ({"candidate": "x on y", "why": "because"},)
    return MachineProfile(
        rests, picked, "2 × the safe default", (measured,), left_out, 3.2, 0.1, date, {"invariclip": "0"}
    )


def put(folder, **facts):
    profile = made(folder, **facts)
    path = profile_path(folder, replace(basis_of(folder, profile.basis.objective, profile.basis.fidelity)))
    write_profile(path, profile)
    return path


def chosen(folder, **asked):
    found = choose(folder, read_manifest(folder), **asked)
    return found.variant, found.backend, found.threads, found.by.partition(" ")[0]


XEON = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 207
model name\t: Intel(R) Xeon(R)   Processor
stepping\t: 2
flags\t\t: fpu sse2 avx2 avx512f amx_bf16 hypervisor

processor\t: 1
cpu part\t: another
flags\t\t: avx_vnni
"""
ARM = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd asimddp i8mm crc32
CPU implementer\t: 0x41
CPU variant\t: 0x1
CPU part\t: 0xd40
"""


def test_processors_are_named_with_what_tells_them_apart():
    assert parse_cpuinfo(XEON) == (
        "Intel(R) Xeon(R) Processor (family 6, model 207, stepping 2)",
        ("amx_bf16", "avx2", "avx512f"),
    )
    assert parse_cpuinfo(ARM) == ("implementer 0x41, part 0xd40, variant 0x1", ("asimd", "asimddp", "i8mm"))
    assert parse_cpuinfo("") == ("", ())


@given(st.text(max_size=300))
def test_any_text_is_read_as_some_processor(text):
    name, instructions = parse_cpuinfo(text)
    assert isinstance(name, str)
    assert set(instructions) <= machine.INSTRUCTIONS


def test_this_machine_is_the_one_that_runs():
    here = this_machine()
    assert here == this_machine()
    assert here.processor
    assert 1 <= here.threads <= len(os.sched_getaffinity(0))
    assert engine_versions()[ORT] == pytest.importorskip(ORT).__version__
    assert load_before() is None or load_before() >= 0
    assert available_memory() is None or available_memory() > 1 << 20


def test_a_profile_comes_back_as_it_was_written(folder, tmp_path):
    profile = made(folder)
    write_profile(tmp_path / "x.json", profile)
    assert read_profile(tmp_path / "x.json") == profile


OTHER = Machine("another", "aarch64", ("asimd",), 64)


def test_the_key_names_machine_objective_and_fidelity_alone(folder):
    basis = basis_of(folder, "latency", "exact", (1,), (1,))
    for change in (
        {"machine": OTHER}, {"machine": replace(basis.machine, threads=7)}, {"objective": "throughput"},
        {"fidelity": "fast"},
    ):  # fmt: skip
        assert file_key(replace(basis, **change)) != file_key(basis)
    for change in ({"engines": {ORT: "0"}}, {"manifest_sha256": "0"}, {"threads": (1, 2)}, {"batches": (2,)}):
        assert file_key(replace(basis, **change)) == file_key(basis)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"machine": OTHER}, ["processor: ", "architecture: ", "instructions: ", "threads of this process: 64 → "]),
        ({"engines": {ORT: "0.1"}}, ["onnxruntime: 0.1 → ", "openvino: not installed → "]),
        ({"manifest_sha256": "abc"}, ["the artifact's manifest: abc → "]),
        ({"objective": "throughput"}, ["objective: throughput → latency"]),
        ({"fidelity": "fast"}, ["fidelity: fast → exact"]),
        ({"threads": (1, 2)}, ["threads tried: 1, 2 → 1"]),
        ({"batches": (4,)}, ["batches tried: 4 → 1"]),
    ],
)
def test_whatever_changed_is_named(folder, change, words):
    now = basis_of(folder, "latency", "exact", (1,), (1,))
    now = replace(now, engines={**now.engines, "openvino": "9"})
    then = replace(now, **change)
    found = changes(then, now)
    assert len(found) == len(words)
    assert all(line.startswith(word) for line, word in zip(found, words, strict=True))


def damaged(plain):
    """Every way to spoil one field of a profile's JSON."""
    yield "schema_version", {**plain, "schema_version": 9}
    yield "key", {**plain, "key": "0" * 16}
    for name in plain:
        yield f"without {name}", {key: value for key, value in plain.items() if key != name}
    yield "more", {**plain, "command": "rm"}
    for name in plain["choice"]:
        yield f"choice {name}", {**plain, "choice": {**plain["choice"], name: [1]}}
    for threads in (0, -1, True, 1.5, "1"):
        yield f"threads {threads!r}", {**plain, "choice": {**plain["choice"], "threads": threads}}
    for name in plain["basis"]:
        yield f"basis {name}", {**plain, "basis": {**plain["basis"], name: 7}}
    for name, value in (("processor", 7), ("threads", "2"), ("threads", 0), ("instructions", [1])):
        machine_ = {**plain["basis"]["machine"], name: value}
        yield f"machine {name}", {**plain, "basis": {**plain["basis"], "machine": machine_}}
    yield "measurement", {**plain, "measurements": [{"ratio": 1}]}
    yield "ratio", {**plain, "measurements": [{**plain["measurements"][0], "ratio": "fast"}]}
    yield "left_out", {**plain, "left_out": [3]}
    yield "load", {**plain, "load": "heavy"}
    yield "seconds", {**plain, "seconds": "long"}
    yield "list", [plain]
    yield "number", 3


def test_a_spoilt_field_is_refused(folder, tmp_path):
    path = tmp_path / "x.json"
    plain = json.loads(json.dumps(made(folder).to_json()))
    assert MachineProfile.from_json(plain).to_json() == made(folder).to_json()
    for name, spoilt in damaged(plain):
        path.write_bytes(sealed_json(spoilt) if isinstance(spoilt, dict) else json.dumps(spoilt).encode())
        said = ""
        try:
            read_profile(path)
        except ProfileError as refused:
            said = str(refused)
        assert said.startswith(f"{path}: "), name


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"NaN", b'{"a": Infinity}', b"[" * 100_000, b"null"],
    ids=["empty", "cut", "bytes", "nan", "infinity", "deep", "null"],
)
def test_what_is_no_profile_is_one_typed_line(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=r"x\.json: ") as refused:
        read_profile(path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_file_that_is_too_large_is_not_read_through(folder, tmp_path):
    path = tmp_path / "x.json"
    write_profile(path, made(folder))
    content = path.read_bytes()
    path.write_bytes(seal(content + b" " * (MAX_PROFILE_BYTES - len(content))))
    assert read_profile(path) == made(folder)
    with path.open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(ProfileError, match="larger than a machine profile can be"):
        read_profile(path)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_damage_is_refused_or_harmless(copied, tmp_path, data):
    path = tmp_path / "x.json"
    write_profile(path, made(copied))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with suppress(ProfileError):
        assert isinstance(read_profile(path), MachineProfile)


def test_without_a_profile_the_safe_default_is_taken(folder):
    assert chosen(folder) == ("float32", ORT, None, "default")
    assert chosen(folder, fidelity="fast") == ("float32", ORT, None, "default")
    assert chosen(folder, threads=1)[2:] == (1, "default")


def test_a_valid_profile_is_used_and_explicit_arguments_win(folder):
    put(folder)
    assert chosen(folder) == ("same", ORT, 1, "profile")
    assert chosen(folder, threads=2) == ("same", ORT, 2, "profile")
    assert chosen(folder, variant="same") == ("same", ORT, 1, "profile")
    assert chosen(folder, backend=ORT) == ("same", ORT, 1, "profile")
    assert chosen(folder, variant="float32") == ("float32", ORT, None, "caller")
    assert chosen(folder, backend="openvino") == ("float32", "openvino", None, "caller")
    assert chosen(folder, variant="same", backend=ORT) == ("same", ORT, None, "caller")
    assert chosen(folder, objective="throughput") == ("float32", ORT, None, "default")
    assert invariclip.load(folder).describe()["chosen_by"].startswith("profile machine-")
    assert invariclip.load(folder, threads=1).describe()["chosen_by"].endswith(", threads by caller")


def test_of_several_levels_the_last_tuned_is_used_or_the_one_asked_for(folder):
    put(folder, fidelity="exact", date="2026-01-01")
    put(folder, fidelity="near", date="2026-01-02", choice=ProfileChoice("near", ORT, 1, 1))
    assert chosen(folder)[0] == "near"
    assert chosen(folder, fidelity="exact")[0] == "same"
    assert chosen(folder, fidelity="near")[0] == "near"
    assert chosen(folder, fidelity="fast")[0] == "near"
    put(folder, fidelity="exact", date="2026-01-03")
    assert chosen(folder)[0] == "same"


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"machine": OTHER}, "processor: another → "),
        ({"engines": {ORT: "0.1"}}, "onnxruntime: 0.1 → "),
        ({"engines": {}}, "onnxruntime: not installed → "),
        ({"manifest_sha256": "abc"}, "the artifact's manifest: abc → "),
        ({"choice": ProfileChoice("absent", ORT, 1, 1)}, "absent on onnxruntime was not proved at fidelity exact"),
        ({"choice": ProfileChoice("near", ORT, 1, 1)}, "near on onnxruntime was not proved at fidelity exact"),
        ({"choice": ProfileChoice("near", "openvino", 1, 1)}, "near on openvino was not proved at fidelity exact"),
        ({"choice": ProfileChoice("same", "abacus", 1, 1)}, "abacus is not installed"),
        ({"choice": ProfileChoice("same", ORT, 4096, 1)}, "4096 threads are more than the"),
    ],
)
def test_a_foreign_or_stale_profile_is_refused_aloud(folder, tmp_path, facts, reason):
    path = put(folder, **facts)
    with pytest.warns(ProfileWarning, match="the machine profile is not used: ") as warned:
        assert chosen(folder) == ("float32", ORT, None, "default")
    assert reason in str(warned[0].message)
    shutil.copy(path, tmp_path / "named.json")
    with pytest.raises(ProfileError, match="is not used: "):
        choose(folder, read_manifest(folder), profile=tmp_path / "named.json")


def test_a_damaged_profile_is_refused_aloud_at_the_callers_line(folder):
    path = put(folder)
    path.write_text(path.read_text()[:-20])
    with pytest.warns(ProfileWarning, match="not readable as JSON") as warned:
        model = invariclip.load(folder)
    assert warned[0].filename == __file__
    assert (model.variant, model.describe()["chosen_by"]) == ("float32", "default")


def test_an_engine_that_went_away_or_was_not_chosen(folder, monkeypatch):
    put(folder, choice=ProfileChoice("same", "openvino", 1, 1))
    here = engine_versions()
    monkeypatch.setattr("invariclip.selection.engine_versions", lambda: {ORT: here[ORT]})
    with pytest.warns(ProfileWarning, match="openvino: .* → not installed"):
        assert chosen(folder)[3] == "default"
    # Another version of an engine that was not chosen changes nothing for whoever serves
    monkeypatch.setattr("invariclip.selection.engine_versions", lambda: {**here, ORT: "99"})
    assert chosen(folder) == ("same", "openvino", 1, "profile")


def test_profiles_of_other_machines_are_no_business_of_this_one(folder):
    profile = made(folder, machine=OTHER)
    write_profile(profile_path(folder, profile.basis), profile)
    assert chosen(folder) == ("float32", ORT, None, "default")


def test_a_named_profile_must_be_there(folder, tmp_path):
    with pytest.raises(ProfileError, match="cannot be read"):
        invariclip.load(folder, profile=tmp_path / "absent.json")


def test_a_fidelity_that_was_not_proved_is_refused(folder):
    with pytest.raises(InputError, match="near on onnxruntime was not proved at fidelity exact; available: float32 on"):
        invariclip.load(folder, variant="near", fidelity="exact")
    assert invariclip.load(folder, variant="near", fidelity="fast").variant == "near"
    with pytest.raises(InputError, match="no fidelity is called 'close'"):
        invariclip.load(folder, fidelity="close")
    with pytest.raises(InputError, match="no objective is called 'power'"):
        invariclip.load(folder, objective="power")


def test_the_safe_default_is_the_closest_that_runs_here(folder, monkeypatch):
    manifest = read_manifest(folder)
    full = manifest.variants["float32"]
    record = full.parity[ORT]

    def of(**variants):
        return safe_default(folder, replace(manifest, variants=variants))

    assert of(near=manifest.variants["near"], same=full, float32=full) == ("float32", ORT)
    assert of(near=manifest.variants["near"], same=full) == ("same", ORT)
    elsewhere = replace(full, parity={"openvino": record})
    assert of(float32=elsewhere) == ("float32", "openvino")
    monkeypatch.setattr("invariclip.selection.is_installed", lambda name: name == ORT)
    assert of(float32=elsewhere) == ("float32", ORT)
    with pytest.raises(ArtifactError, match="no variant that runs here was proved exact; name one with variant="):
        of(near=manifest.variants["near"])


def test_exporting_over_an_artifact_leaves_no_profile(folder):
    from invariclip.files import new_directory

    path = put(folder)
    with new_directory(folder) as fresh:
        (fresh / "manifest.json").write_text("{}")
    assert not path.exists()
