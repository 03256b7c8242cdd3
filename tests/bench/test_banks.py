"""Forms of the class bank's product: all answer the same, as closely as their weights allow, and make one table."""

import json
from dataclasses import asdict

from invariclip.bench import banks


def test_every_form_answers_the_product(monkeypatch):
    monkeypatch.setattr(banks, "CLASSES", 8)
    monkeypatch.setattr(banks, "_EMPTIES", 1 << 12)
    forms = banks.time_forms(1, 2)
    assert len({form.name for form in forms}) == len(forms) >= 9
    for form in forms:
        bound = 5e-3 if "int8" in form.name else 1e-4 if "float16" in form.name else 1e-6
        assert form.error < bound, form
        # rounding to eight bits must show, or the form is not what it says
        assert (form.error > 1e-5) == ("int8" in form.name or "float16" in form.name), form
        assert form.few_ms > 0
        assert form.many_ms > 0
    plain = {"threads": 1, "repetitions": 2, "engines": {"onnxruntime": "1"}, "forms": [asdict(one) for one in forms]}
    page = banks.page(json.loads(json.dumps(plain)))
    assert all(f"| {form.name} | {form.few_ms:.2f} | {form.many_ms:.2f} |" in page for form in forms)
