"""Plans for GPUs without having them: a small network's kernels and bytes stay below limits."""

import json

import pytest

from hnet.errors import ConfigError
from hnet.train.named import run_config
from tpu.aot import compile_plan
from tpu.chips import GPUS, assumed_cudnn, open_slice
from tpu.plan import main
from tpu.roofline import hbm_per_byte, kernels

NETWORK = {
    "arch_layout": ["m2", ["T2"], "m2"], "d_model": [64, 128], "d_intermediate": [0, 256],
    "ssm_cfg": {"d_state": 32}, "attn_cfg":
        {"num_heads": [2, 2], "rotary_emb_dim": [16, 16], "window_size": [-1, -1]},
}  # fmt: skip


@pytest.fixture
def network(tmp_path):
    """Command-line words of a network with every kind of layer of 1stage_XL."""
    file = tmp_path / "network.json"
    file.write_text(json.dumps(NETWORK))
    words = [str(file), "--data.seq_len", "2048", "--data.batch_size", "2"]
    return [*words, "--model.compute.dtype", "bfloat16", "--model.compute.remat", "layer"]


@pytest.mark.cuda
def test_few_kernels_and_bytes(network):
    """No loop of small kernels: limits are about 10 % above the counted values."""
    plan = compile_plan(run_config(network), open_slice("h100:1"), (512,), to_code=False)
    assert plan.fits and plan.compile_seconds is None
    assert kernels(plan) <= 990
    assert hbm_per_byte(plan) <= 0.36e6


@pytest.mark.cuda
def test_our_kernels_compile_for_a_gpu_and_move_less(network):
    """The SSD in Triton, to machine code; unrolled layers are not copied to and from stacks."""
    words = [*network, "--model.compute.ssd_backend", "triton", "--model.compute.remat", "dots"]
    words += ["--model.compute.scan_layers", "False"]
    plan = compile_plan(run_config(words), open_slice("h100:1"), (512,))
    assert plan.fits and plan.compile_seconds > 0
    assert kernels(plan) <= 620
    assert hbm_per_byte(plan) <= 0.2e6


@pytest.mark.cuda
def test_a_loop_of_small_kernels_is_seen(network):
    """Backends that `auto` must not take on a GPU: blocks of 128 queries, a loop over states."""
    words = [*network, "--model.compute.attention_backend", "xla", "--model.compute.ssd_backend"]
    words += ["xla", "--model.compute.attention_block_len", "128"]
    plan = compile_plan(run_config(words), open_slice("h100:1"), (512,), to_code=False)
    assert kernels(plan, "stage1/main_network") > 1000 and kernels(plan, "stage0/encoder") > 250


@pytest.mark.cuda
def test_a_plan_for_several_gpus(network, capsys):
    words = ["--topology", "h100:8", "--no-code", "--rate", "1", *network, "--data.batch_size", "8"]
    assert main([*words, "--mesh.data", "2", "--mesh.fsdp", "4"]) == 0
    out = capsys.readouterr().out
    assert "h100:8: 8 devices" in out and "fits" in out and "kernels" in out
    assert "all-gather          over 4" in out


@pytest.mark.cuda
@pytest.mark.parametrize("kind", GPUS)
def test_every_gpu_can_be_compiled_for(kind):
    slice_ = open_slice(f"{kind}:2x4")
    assert len(slice_.devices) == 8 and slice_.devices[0].platform == "gpu"
    assert slice_.devices[0].device_kind == GPUS[kind].name


def test_without_the_plugin_one_line_says_what_to_install(monkeypatch):
    def missing(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("tpu.chips.topologies.get_topology_desc", missing)
    with pytest.raises(ConfigError, match="the extra cuda12") as e:
        open_slice("h100:8")
    assert "\n" not in str(e.value)


@pytest.mark.cuda
def test_versions_are_assumed_only_while_a_program_is_traced():
    from jax._src.cudnn import fused_attention_stablehlo as fused

    before = fused.check_cudnn_version, fused.check_compute_capability
    with assumed_cudnn(open_slice("a100:1")):
        assert fused.check_cudnn_version() >= 91000
        assert fused.check_compute_capability("8.0") and not fused.check_compute_capability("9.0")
    assert before == (fused.check_cudnn_version, fused.check_compute_capability)
