import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # so that plain `pytest` works as well as `python -m pytest`

import clip  # noqa: E402
import data  # noqa: E402
from model import PromptSG  # noqa: E402
from util import demo  # noqa: E402

# Autograd starts its threads at its first backward pass. After torch.export that is one too many for test_processes.py,
# which forks; so the first one is here.
torch.ones(1, requires_grad=True).backward()


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory) -> Path:
    """A --data-root with a small drawing of the demo data: 20 + 6 identities, four cameras."""
    root = tmp_path_factory.mktemp("data")
    demo.draw_dataset(root / "synthetic", data.MARKET_FOLDERS, train_ids=20, test_ids=6, pictures=8)
    return root


@pytest.fixture
def make_model():
    """Builds the demo's tiny model, with the arguments of PromptSG."""

    def make(num_identities: int = 10, **ablations) -> PromptSG:
        torch.manual_seed(0)
        return PromptSG(clip.untrained("tiny", (64, 32)), num_identities, **ablations)

    return make


@pytest.fixture
def images() -> torch.Tensor:
    """Eight normalised images for `make_model`'s model."""
    return torch.randn(8, 3, 64, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
