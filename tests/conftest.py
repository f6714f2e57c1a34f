"""What every test may use: a tiny random Phi-3, its tokenizer, and the embedded model."""

import os

# Before transformers is imported: no test may reach a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# What is shown must not depend on where the tests run; a test that wants a terminal forces one.
for _name in (
    "NO_COLOR",
    "FORCE_COLOR",
    "COLORTERM",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
    "COLUMNS",
    "LINES",
):
    os.environ.pop(_name, None)
os.environ["TERM"] = "xterm"

import pytest  # noqa: E402

# Only converted models may stay in it: converting one takes long.
_USERS_CACHE = os.environ.get("PHLORA_CACHE")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """The cache of this session and of the processes that it starts; nothing goes into the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHLORA_CACHE", str(folder))
        yield folder


def pytest_generate_tests(metafunc):
    """Run a test that asks for `device` on the processor, and on a GPU where there is one."""
    if "device" in metafunc.fixturenames:
        import torch

        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        metafunc.parametrize("device", devices, indirect=True, scope="session")


@pytest.fixture(scope="session")
def device(request):
    """`cpu` or `cuda`; sums there are in full fp32, as the tolerances want them."""
    if request.param == "cuda":
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return request.param


@pytest.fixture
def tiny():
    """A fresh `(model, tokenizer)`: a random Phi-3 of 2 layers, and a tokenizer with Phi-3's markers."""
    from phlora.testing import tiny_phi3

    return tiny_phi3()


@pytest.fixture
def tiny_tokenizer():
    """A fresh tokenizer with Phi-3's special tokens and chat template, made in memory."""
    from phlora import testing

    return testing.tiny_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder with the tiny random Phi-3 and its tokenizer; read it, do not write into it."""
    from phlora.testing import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("tiny-phi3"))


@pytest.fixture(scope="session")
def smollm2_folder(cache_folder):
    """The folder of the embedded model; the first use on a machine converts it."""
    pytest.importorskip("gguf")
    from phlora.models.builtin import embedded_folder

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PHLORA_CACHE")
        folder = embedded_folder("smollm2-135m", cache_dir=_USERS_CACHE)
    (cache_folder / folder.name).symlink_to(folder, target_is_directory=True)
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_folder):
    """The embedded model in fp32 and its tokenizer, shared by the whole session: leave both as they are."""
    from phlora.models.load import load_model

    loaded = load_model("smollm2-135m", dtype="float32", device="cpu")
    return loaded.model, loaded.tokenizer.tokenizer
