"""Heads and adapters over the real client and a Hub on the loopback interface: pushed, pulled, pinned, refused, cut off."""

from __future__ import annotations

import json
import re
from contextlib import suppress

import huggingface_hub.constants
import pytest
import transformers
import transformers.utils.hub
import yaml
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from peft_caft.basics.contents import contents_of
from peft_caft.hub.inspection import inspect
from peft_caft.hub.publishing import TOKENIZER_FILES

from ..support.hub_client import ClientError
from ..support.seeded_heads import load, push, seed_of


@pytest.fixture(autouse=True)
def no_fault_is_left(hub):
    yield
    left = [fault for fault in hub.faults if fault.times > 0]
    hub.faults.clear()
    assert not left, "a fault that never happened tests nothing"


def card_of(hub, repo_id, ref="main"):
    """Metadata and text of a repository's card."""
    _, front, text = hub.files(repo_id, ref)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize("head_type", ["residual", "decoder_layer"])
def test_pulled_heads_equal_the_pushed_ones(client, hub, head_type):
    repo_id = f"org/{head_type}"
    oid = client.run("push(1, repo_id, head_type=head_type)", repo_id=repo_id, head_type=head_type)
    assert hub.head(repo_id) == oid
    assert client.run("heads = load(repo_id); [seed_of(heads), heads.repo_id, heads.commit]") == [1, repo_id, oid]
    assert set(hub.files(repo_id)) == {"config.json", "model.safetensors", "README.md"}


def test_pinned_revision_loads_the_old_heads(client):
    old, new = client.run("[push(1, 'org/pinned'), push(2, 'org/pinned')]")
    assert client.run("seed_of(load('org/pinned'))") == 2
    assert client.run("heads = load('org/pinned', revision=old); [seed_of(heads), heads.commit]", old=old) == [1, old]
    assert old != new


def test_configuration_and_weights_come_from_one_commit(client, hub, tmp_path):
    old = client.run("push(1, 'org/moving')")
    new = client.run("push(2, 'org/moving')")
    # Someone else's push lands between the two downloads: main moves on when the configuration has been read.
    repository, listened = hub.repositories["org/moving"], hub.fault_for
    repository.refs["main"] = old

    def moving(request):
        if request.endswith("model.safetensors"):
            repository.refs["main"] = new
        return listened(request)

    hub.fault_for = moving
    try:
        heads = client.run(
            "heads = load('org/moving', cache_dir=cache); [seed_of(heads), heads.commit]", cache=str(tmp_path)
        )
    finally:
        del hub.fault_for
    assert hub.head("org/moving") == new
    assert heads == [1, old]


def test_same_heads_again_make_no_new_commit(client):
    assert client.run("push(3, 'org/again') == push(3, 'org/again')")


def test_branch_and_pull_request_leave_main_alone(client, hub):
    first = client.run("push(1, 'org/branches')")
    assert (
        client.run("seed_of(load('org/branches', revision='v2')) if push(2, 'org/branches', revision='v2') else 0")
        == 2
    )
    request = client.run("made(3).push_to_hub('org/branches', token='write-token', create_pr=True).pr_revision")
    assert client.run("seed_of(load('org/branches', revision=request))", request=request) == 3
    assert hub.head("org/branches") == first
    with pytest.raises(ClientError, match=r"ValueError: revision: got 'v2' together with create_pr"):
        client.run("push(3, 'org/branches', revision='v2', create_pr=True)")


def test_large_weights_go_in_parts(client, hub):
    hub.multipart_above = 4000
    try:
        client.run("push(4, 'org/parts')")
    finally:
        hub.multipart_above = 1 << 30
    assert any(request.startswith("POST /complete/") for request in hub.requests)
    assert client.run("seed_of(load('org/parts'))") == 4


def test_private_heads_need_a_token(client, hub, tmp_path):
    client.run("push(1, 'org/private', private=True)")
    assert hub.repositories["org/private"].private
    with pytest.raises(
        ClientError, match=r"FileNotFoundError: heads: 'org/private'.*private and the token.*hf auth login"
    ):
        client.run("load('org/private', cache_dir=cache)", cache=str(tmp_path))
    with pytest.raises(ClientError, match=r"FileNotFoundError: heads: 'org/private'.*private"):
        client.run("load('org/private', cache_dir=cache, token='read-token')")
    with pytest.raises(ClientError, match=r"Error: heads: 'org/private'.*hf auth login"):
        client.run("load('org/private', cache_dir=cache, token='unknown')")
    assert client.run("seed_of(load('org/private', cache_dir=cache, token='write-token'))") == 1


def test_push_without_the_right_to_is_refused_and_changes_nothing(client, hub):
    before = client.run("push(1, 'org/guarded')")
    for token in ("'read-token'", "'unknown'", "False"):
        with pytest.raises(ClientError, match=r"PermissionError: repo_id: 'org/guarded'.*hf auth login.*may write"):
            client.run(f"push(2, 'org/guarded', token={token})")
    assert hub.head("org/guarded") == before
    with pytest.raises(ClientError, match="FileExistsError: private: 'org/guarded' exists and is public"):
        client.run("push(2, 'org/guarded', private=True)")


def test_what_is_not_there_is_named(client, tmp_path):
    client.run("push(1, 'org/there')")
    for code, message in (
        ("load('org/nowhere', token='write-token')", r"FileNotFoundError: heads: 'org/nowhere'.*no such repository"),
        ("load('org/there', revision='v9')", r"FileNotFoundError: heads: 'org/there'.*no revision v9.*branch, tag"),
        ("load('org/there', local_files_only=True, cache_dir=cache)", r"FileNotFoundError.*not in the local cache"),
        ("load('not a name')", r"FileNotFoundError: heads: 'not a name' is neither a folder nor a Hub repository id"),
    ):
        with pytest.raises(ClientError, match=message):
            client.run(code, cache=str(tmp_path))


def test_failing_hub_says_so_and_works_again(client, hub, tmp_path):
    oid = client.run("push(1, 'org/flaky')")
    hub.fail("HEAD /org/flaky/resolve/main/config.json", status=503)  # the client tries again by itself
    assert client.run("seed_of(load('org/flaky', cache_dir=cache))", cache=str(tmp_path / "head")) == 1
    hub.fail("GET /get/", status=503)
    with pytest.raises(ClientError, match=r"ConnectionError: heads: 'org/flaky'.*the Hub failed.*run the same again"):
        client.run("load('org/flaky', cache_dir=cache)", cache=str(tmp_path / "get"))
    assert client.run("seed_of(load('org/flaky', cache_dir=cache))") == 1
    hub.fail("PUT /put/", status=503)
    client.run("push(6, 'org/flaky')")
    hub.fail("POST /api/models/org/flaky/commit/", status=500)
    with pytest.raises(ClientError, match=r"ConnectionError: repo_id: 'org/flaky'.*the Hub failed"):
        client.run("push(3, 'org/flaky')")
    assert client.run("seed_of(load('org/flaky'))") == 6
    client.run("push(3, 'org/flaky')")
    assert client.run("[seed_of(load('org/flaky')), seed_of(load('org/flaky', revision=oid))]", oid=oid) == [3, 1]


def run_at_most_twice(client, code, **variables):
    """A newer huggingface_hub sends or fetches again by itself what was cut off; 1.5 leaves that to whoever reads the error."""
    try:
        return client.run(code, **variables)
    except ClientError as error:
        if not re.search(r"^ConnectionError: .*No file was changed by halves: run the same again", str(error)):
            raise
        return client.run(code, **variables)


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
def test_download_cut_in_mid_transfer_never_gives_half_heads(client, hub, tmp_path, reset):
    client.run("push(2, 'org/cut')")
    hub.fail("GET /get/", after=5000, reset=reset)
    loads = "seed_of(load('org/cut', cache_dir=cache))"
    if reset:  # the client does not go on after a reset
        with pytest.raises(ClientError, match=r"ConnectionError: heads: 'org/cut'.*broke off.*run the same again"):
            client.run(loads, cache=str(tmp_path))
    assert run_at_most_twice(client, loads, cache=str(tmp_path)) == 2


def test_upload_cut_in_mid_transfer_publishes_all_or_nothing(client, hub):
    before = client.run("push(1, 'org/upload')")
    hub.fail("POST /api/models/org/upload/commit/", after=100)
    with pytest.raises(ClientError, match=r"ConnectionError: repo_id: 'org/upload'.*broke off"):
        client.run("push(2, 'org/upload')")
    assert hub.head("org/upload") == before
    hub.fail("PUT /put/", after=2000)
    run_at_most_twice(client, "push(5, 'org/upload')")
    assert client.run("seed_of(load('org/upload'))") == 5


def test_push_on_top_of_an_unseen_push_is_refused(client, hub):
    client.run("push(1, 'org/race')")
    repository, listened = hub.repositories["org/race"], hub.fault_for

    def meanwhile(request):
        if request.startswith("POST /api/models/org/race/preupload"):
            repository.commit("main", {"config.json": b"{}"}, "someone else's")
        return listened(request)

    hub.fault_for = meanwhile
    try:
        with pytest.raises(ClientError, match=r"ConnectionError: repo_id: 'org/race'.*changed by someone else"):
            client.run("push(2, 'org/race')")
    finally:
        del hub.fault_for
    assert hub.files("org/race") == {"config.json": b"{}"}


def test_heads_over_heads_of_another_base_model_are_refused_unless_forced(client, hub):
    before = client.run("push(1, 'org/taken')")
    for code, message in (
        (
            "made(2, tiny_llama(hidden_size=64), 'org/wide')",
            r"heads for org/tiny-llama \(hidden_size 32 instead of 64\)",
        ),
        (
            "made(2, tiny_llama(seed=1), 'org/other')",
            r"heads for org/tiny-llama \(another unembedding\).*for org/other",
        ),
        ("made(2, None, 'org/same-sizes')", "another name"),
    ):
        with pytest.raises(ClientError, match=rf"FileExistsError: repo_id: 'org/taken' holds.*{message}.*--force"):
            client.run(f"{code}.push_to_hub('org/taken', token='write-token')")
    assert hub.head("org/taken") == before
    client.run(
        "made(2, tiny_llama(hidden_size=64), 'org/wide').push_to_hub('org/taken', token='write-token', force=True)"
    )
    assert json.loads(hub.files("org/taken")["config.json"])["hidden_size"] == 64


def test_heads_over_a_model_are_refused(client, hub):
    client.run("from huggingface_hub import HfApi; HfApi(token='write-token').create_repo('org/model').repo_id")
    hub.repositories["org/model"].commit("main", {"config.json": b'{"architectures": ["LlamaForCausalLM"]}'}, "model")
    with pytest.raises(ClientError, match="FileExistsError: repo_id: 'org/model' holds something else"):
        client.run("push(1, 'org/model')")


def test_card_has_the_metadata_that_the_hub_files_it_by(client, hub):
    client.run("push(1, 'org/card', license='apache-2.0')")
    metadata, text = card_of(hub, "org/card")
    assert metadata == {
        "base_model": "org/tiny-llama",
        "base_model_relation": "adapter",
        "library_name": "peft-caft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["caft", "auxiliary-heads", "multi-token-prediction"],
    }
    assert 'CAFTConfig(heads="org/card"' in text
    assert "not trained" in text
    assert json.loads(hub.files("org/card")["config.json"])["license"] == "apache-2.0"


def test_configuration_with_a_hub_id_trains_with_those_heads(client):
    oid = client.run("push(1, 'org/used')")
    trained = client.run(
        """
config = CAFTConfig(heads="org/used", num_auxiliary_heads=3, target_modules="all-linear")
model = get_peft_model(tiny_llama(), config)
ids = torch.arange(40).view(2, 20)
model(input_ids=ids, labels=ids).loss.backward() if model.set_training_progress(0, 10) is None else None
gradient = sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None).item()
model.save_pretrained(folder)
[seed_of(model.auxiliary_heads["default"]), gradient > 0, json.loads(Path(folder, "caft_config.json").read_text())]
""",
        folder=str(client.run("import tempfile; tempfile.mkdtemp()")),
    )
    assert trained[:2] == [1, True]
    assert {"heads": "org/used", "heads_revision": None, "heads_commit": oid}.items() <= trained[2].items()


@pytest.fixture(scope="module")
def adapter(client, tmp_path_factory):
    """Folder of heads, and folder of an adapter that was trained with them, with everything that a run leaves there."""
    folder = tmp_path_factory.mktemp("adapter")
    client.run(
        """
folder = Path(folder)
made(1).save_pretrained(folder / "heads")
save_checkpoint(folder / "model")
from transformers import AutoModelForCausalLM, AutoTokenizer
config = CAFTConfig(heads=str(folder / "heads"), num_auxiliary_heads=3, target_modules="all-linear")
get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), config).save_pretrained(folder / "adapter")
AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "adapter")
for where in ("adapter", "heads"):
    for name in ("checkpoints/checkpoint-1/optimizer.pt", "training_args.bin", "run.json", "summary.json", ".x.tmp",
                 ".config.json.pending", "trained_heads/config.json"):
        (folder / where / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / where / name).write_text("{}")
""",
        folder=str(folder),
    )
    return folder


PUSH = """
from peft_caft.heads.repository import Destination
from peft_caft.hub.publishing import push as push_folder
push_folder(folder, Destination(repo_id, token="write-token"), **options).oid
"""


COMMAND = """
from unittest.mock import patch
from tests.support.commands import peft_caft
with patch.dict(os.environ, HF_TOKEN="write-token"):
    output = peft_caft(*arguments)
output
"""


def test_adapter_names_its_heads_by_repository_and_commit(client, hub, adapter):
    arguments = ["push", str(adapter / "heads"), "org/the-heads", "--license", "mit", "--message", "first"]
    output = client.run(COMMAND, arguments=arguments)
    commit = hub.head("org/the-heads")
    assert f"{hub.endpoint}/org/the-heads" in output
    assert commit in output
    assert hub.repositories["org/the-heads"].commits[commit].message == "first"
    assert set(hub.files("org/the-heads")) == {"config.json", "model.safetensors", "README.md"}
    options = {"heads": "org/the-heads@main", "base_model": "org/tiny-llama"}
    client.run(PUSH, folder=str(adapter / "adapter"), repo_id="org/the-adapter", options=options)
    files = hub.files("org/the-adapter")
    assert set(files) == {
        *("adapter_config.json", "adapter_model.safetensors", "caft_config.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    caft = json.loads(files["caft_config.json"])
    assert (caft["heads"], caft["heads_revision"]) == ("org/the-heads", commit)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/tiny-llama"
    assert not [name for name, content in files.items() if str(adapter).encode() in content]
    metadata, text = card_of(hub, "org/the-adapter")
    assert (metadata["base_model"], metadata["library_name"]) == ("org/tiny-llama", "peft")
    assert "org/the-heads" in text
    assert commit in text
    # And whoever goes on training with the published adapter gets the very same heads.
    client.run("push(2, 'org/the-heads')")
    continued = """
from peft_caft import load_adapter
model = load_adapter(tiny_llama(), "org/the-adapter")
seed_of(model.auxiliary_heads["default"])
"""
    assert client.run(continued) == 1


def test_paths_of_this_machine_are_not_published(client, hub, adapter):
    for options, message in (
        ({}, r"base_model: got '.*model'.*--base-model"),
        ({"base_model": "org/tiny-llama"}, r"heads: got '.*heads'.*--heads ORG/NAME@COMMIT"),
        ({"base_model": "org/tiny-llama", "heads": "org/nothing"}, "heads: 'org/nothing'.*no such repository"),
    ):
        with pytest.raises(ClientError, match=message):
            client.run(PUSH, folder=str(adapter / "adapter"), repo_id="org/refused", options=options)
    assert "org/refused" not in hub.repositories


def test_other_heads_than_those_trained_with_are_refused(client, adapter):
    client.run("push(4, 'org/other-heads')")
    options = {"heads": "org/other-heads", "base_model": "org/tiny-llama"}
    with pytest.raises(ClientError, match=r"ValueError: heads: 'org/other-heads' holds other weights"):
        client.run(PUSH, folder=str(adapter / "adapter"), repo_id="org/refused", options=options)


def test_other_heads_than_those_of_the_hub_trained_with_are_refused(client, adapter):
    client.run("push(1, 'org/trained-with'); push(5, 'org/not-trained-with')")
    code = """
config = CAFTConfig(heads="org/trained-with", num_auxiliary_heads=3, target_modules="all-linear")
get_peft_model(tiny_llama(), config).save_pretrained(folder)
"""
    client.run(code, folder=str(adapter / "hub-adapter"))
    options = {"heads": "org/not-trained-with", "base_model": "org/tiny-llama"}
    with pytest.raises(ClientError, match=r"'org/not-trained-with' holds other weights .* than 'org/trained-with'"):
        client.run(PUSH, folder=str(adapter / "hub-adapter"), repo_id="org/refused", options=options)


def test_force_leaves_one_kind_of_artifact(client, hub, adapter):
    client.run("push(1, 'org/forced')")
    options = {"heads": "org/forced", "base_model": "org/tiny-llama"}
    client.run("push(1, 'org/forced-heads')")
    client.run(PUSH, folder=str(adapter / "adapter"), repo_id="org/forced-heads", options=options | {"force": True})
    assert not {"config.json", "model.safetensors"} & set(hub.files("org/forced-heads"))
    client.run("push(2, 'org/forced-heads', force=True)")
    assert set(hub.files("org/forced-heads")) >= {"config.json", "model.safetensors", "README.md"}
    assert not {name for name in hub.files("org/forced-heads") if "adapter" in name or "caft" in name}
    assert client.run("seed_of(load('org/forced-heads'))") == 2
    client.run("push(3, 'org/forced-heads')")  # and the next push needs no force


def test_adapter_and_heads_never_replace_each_other(client, hub, adapter):
    client.run("push(1, 'org/occupied')")
    options = {"heads": "org/occupied", "base_model": "org/tiny-llama"}
    with pytest.raises(ClientError, match="FileExistsError: repo_id: 'org/occupied' holds heads or a model"):
        client.run(PUSH, folder=str(adapter / "adapter"), repo_id="org/occupied", options=options)
    client.run(PUSH, folder=str(adapter / "adapter"), repo_id="org/an-adapter", options=options)
    with pytest.raises(ClientError, match="FileExistsError: repo_id: 'org/an-adapter' holds an adapter"):
        client.run("push(1, 'org/an-adapter')")
    with pytest.raises(ClientError, match=r"holds an adapter of org/tiny-llama.*one of an adapter of org/else"):
        client.run(
            PUSH,
            folder=str(adapter / "adapter"),
            repo_id="org/an-adapter",
            options=options | {"base_model": "org/else"},
        )


def test_card_that_its_owner_wrote_is_kept(client, hub, tmp_path):
    client.run("made(1).save_pretrained(folder)", folder=str(tmp_path))
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n\n# My own words\n")
    client.run(PUSH, repo_id="org/own-card", options={"license": "other"})
    metadata, text = card_of(hub, "org/own-card")
    assert metadata == {"base_model": "org/tiny-llama", "license": "other", "language": "en"}
    assert text.strip() == "# My own words"


def test_damaged_heads_are_not_published(client, hub, tmp_path):
    client.run("made(1).save_pretrained(folder)", folder=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ClientError, match=r"ValueError: .*model\.safetensors: damaged"):
        client.run(PUSH, repo_id="org/damaged", options={})
    assert "org/damaged" not in hub.repositories


def test_folder_of_neither_is_refused(client, tmp_path):
    with pytest.raises(
        ClientError, match=r"FileNotFoundError: folder: neither config\.json \(of heads\) nor adapter_config"
    ):
        client.run(PUSH, folder=str(tmp_path), repo_id="org/none", options={})


def test_offline_after_download(client, home, monkeypatch):
    """The process of the tests knows no Hub but HF_HUB_OFFLINE; here it gets the cache into which the client downloaded."""
    oid = client.run("push(1, 'org/offline'); load('org/offline').commit")
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    heads = load("org/offline")
    assert (seed_of(heads), heads.commit) == (1, oid)
    assert seed_of(load("org/offline", revision=oid)) == 1
    assert "org/offline at commit" in inspect("org/offline").text()
    monkeypatch.setattr(transformers.utils.hub, "HF_HUB_CACHE", str(home / "hub"), raising=False)
    assert contents_of("heads", "org/offline") == {"heads_commit": oid}
    with pytest.raises(FileNotFoundError, match=r"artifact: 'org/never-loaded'.*not in the local cache"):
        inspect("org/never-loaded")
    with pytest.raises(FileNotFoundError, match=r"not in the local cache.*Load it once online"):
        load("org/never-loaded")
    with pytest.raises(ConnectionError, match=r"repo_id: 'org/offline'.*HF_HUB_OFFLINE"):
        push(1, "org/offline")


def test_every_vocabulary_that_transformers_knows_is_published_with_the_adapter():
    known: set[str] = set()
    for classes in TOKENIZER_MAPPING_NAMES.values():
        for name in [classes] if isinstance(classes, str) else filter(None, classes or ()):
            with suppress(ImportError):  # of a package that is not installed
                found = getattr(getattr(transformers, name, None), "vocab_files_names", {})
                known |= {file for file in found.values() if isinstance(file, str)}
    assert {"tokenizer.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "merges.txt"} <= known
    elsewhere = {
        "entity_vocab.json",
        "emoji.json",
        "byte_maps.json",
        "spm_char.model",
        "normalizer.json",
        "vocab-src.json",
    }
    elsewhere |= {"vocab-tgt.json", "word_shape.json", "word_pronunciation.json", "prophetnet.tokenizer"}
    assert known - elsewhere <= set(TOKENIZER_FILES)  # elsewhere: of models that are no causal language models
