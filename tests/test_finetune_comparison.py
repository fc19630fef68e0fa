"""comparisons/finetune_against_monai.py at its smallest, in this process, where all is imported."""

import re

import pytest

pytestmark = [pytest.mark.scripts, pytest.mark.filterwarnings("ignore")]  # MONAI's and PyTorch's


@pytest.fixture
def run(monkeypatch, capsys):
    """The command's output."""
    pytest.importorskip("torch", reason="need PyTorch")
    from comparisons import finetune_against_monai, our_finetuning

    for module in (finetune_against_monai, our_finetuning):
        monkeypatch.setattr(module, "in_own_process", lambda call, *args, **how: call(*args, **how))

    def run(*flags):
        status = finetune_against_monai.main([*flags, "--config.model.use_v2=False"])
        found = capsys.readouterr()
        assert status == 0, found.out + found.err
        return found.out

    return run


def test_monais_training_computes_the_same(run):
    out = run("step", "--size", "tiny", "--steps", "2", "--warmup", "1")
    assert "losses of the first 3 updates in float32" in out


def test_monais_prediction_gives_the_same_mask(run):
    """Of float16 images: uint8 rounds them, and random weights see it."""
    out = run("predict", "--tiny", "--config.data.sources.ct.chain.dtype=float16")
    (share,) = re.findall(r"the masks agree in ([\d.]+)%", out)
    assert float(share) > 99.9
