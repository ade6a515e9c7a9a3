"""The options of Inductor; what they do to its kernels is tested on fake GPUs."""

import subprocess
import sys
from types import SimpleNamespace

from dmtjepa.training import inductor


def test_options_are_set_where_inductor_has_them(monkeypatch, caplog):
    config = SimpleNamespace(
        triton=SimpleNamespace(mix_order_reduction_non_strict_mode=False), inductor_choices_class=None
    )
    monkeypatch.setattr(inductor, "config", config)
    inductor.configure_inductor()
    assert config.triton.mix_order_reduction_non_strict_mode is True
    assert config.inductor_choices_class is inductor.RowsInRegisters
    monkeypatch.setattr(inductor, "config", SimpleNamespace(triton=SimpleNamespace()))
    with caplog.at_level("INFO"):
        inductor.configure_inductor()
    assert "has no option mix_order_reduction_non_strict_mode" in caplog.text
    assert "has no option inductor_choices_class" in caplog.text


def test_who_does_not_compile_does_not_import_inductor():
    program = "import sys, dmtjepa.training.parallelize; sys.exit('torch._inductor.choices' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
