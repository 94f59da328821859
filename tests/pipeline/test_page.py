"""report.html: one file, nothing from elsewhere, names as text; a browser shows it. report.json: as documented."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints_tiny import VOCAB
from PIL import Image

import lmc_fast as lmc
from lmc_fast.pipeline.page import page

HOSTILE = '<script>alert("x")</script>&\x1b[31m\udcff'
VOID = {"meta", "img", "br", "input", "link"}


class Page(HTMLParser):
    """Tags that are open, and all that could load or run something."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.tags, self.text = [], [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def made(make_checkpoint, tmp_path_factory):
    """made(models, **options) -> (report, directory) of a run on random models; cached."""
    known = {}

    def make(count=2, **options):
        key = (count, *sorted(options.items()))
        if key not in known:
            out = tmp_path_factory.mktemp("page") / "out"
            models = lmc.open_models([make_checkpoint("neox", seed) for seed in range(1, count + 1)])
            tokens = torch.from_numpy(np.random.default_rng(0).integers(VOCAB, size=(12, 16)))
            known[key] = lmc.run(models, tokens, out, batch=3, **options), out
        return known[key]

    return make


CASES = {
    "learned": {"steps": 3},
    "matched": {"method": "weight"},
    "three": {"count": 3, "steps": 2},
    "within a budget": {"steps": 2, "memory": 2 << 30},
    "no curves": {"steps": 1, "curves": False},
}


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_whole_and_stands_alone(case, made):
    report, out = made(**CASES[case])
    written = (out / "report.html").read_text()
    assert written == page(json.loads((out / "report.json").read_text()), out)
    found = Page(written)
    assert not found.open and not found.tags & {"script", "iframe", "object", "embed", "base", "form"}
    assert all(source.startswith("data:image/png;base64,") for source in found.sources)
    pictures = [name for name in ("curve.png", "learning.png") if (out / name).exists()]
    assert len(found.sources) == len(pictures)
    for member in report["members"]:
        assert member["source"] in found.text
    for curve in report.get("curves", []):
        assert f"{curve['barrier']:.4f}" in found.text
    assert f"{report['proof']['a']['kl']:.1e}" in found.text


def test_names_are_text(made):
    report, out = made(**CASES["learned"])
    hostile = json.loads(json.dumps(report))
    hostile["members"][0]["source"], hostile["notes"] = HOSTILE, [HOSTILE]
    found = Page(page(hostile, out))
    assert "script" not in found.tags and '<script>alert("x")</script>&' in found.text
    page(hostile, out).encode()
    assert "\x1b" not in found.text


def test_a_browser_shows_it(made, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    _, out = made(**CASES["learned"])
    picture = tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1600", f"--screenshot={picture}"]
    done = subprocess.run([*command, (out / "report.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert picture.is_file(), done.stderr[-2000:]
    with Image.open(picture) as shown:
        assert shown.size == (1000, 1600)
        pixels = np.asarray(shown.convert("RGB")).reshape(-1, 3)
    colours = np.unique(pixels, axis=0)
    assert len(colours) > 100 and (pixels != pixels[0]).any(1).mean() > 0.01  # text and a picture, not an empty page


@pytest.mark.parametrize("case", CASES)
def test_the_report_is_as_its_schema_says(case, made):
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    file = Path(__file__).resolve().parents[2] / "docs" / "reference" / "report.schema.json"
    schema = json.loads(file.read_text())
    _, out = made(**CASES[case])
    report = json.loads((out / "report.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(report, schema)
    assert set(report) <= set(schema["properties"]), "docs/reference/report.schema.json does not say what this is"
    for missing in schema["required"]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({key: value for key, value in report.items() if key != missing}, schema)
    broken = json.loads(json.dumps(report))
    broken["proof"]["a"]["kl"] = "small"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)
