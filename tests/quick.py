"""What keeps tests quick: compiler options, and the modules of the quick tier (README.md)."""

from importlib.util import find_spec

import jax

# A fifth of the default's compile time; tests/conftest.py sets the same by XLA_FLAGS. LLVM compiles
# a program of our size faster as one module than as 32.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
OPTIMIZED = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True
# The compiler for TPUs reads the same environment and ends at a flag that it does not know.
FLAGS = {k: v for k, v in QUICK.items() if "cpu" not in k or find_spec("libtpu") is None}
QUICK_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in FLAGS.items())

MODULES = frozenset(
    """
    checkpoint/test_leaves.py
    chunking/test_config.py
    chunking/test_targets.py
    data/test_corpus.py
    data/test_files.py
    data/test_forms.py
    data/test_identity.py
    data/test_json_lines.py
    data/test_packing.py
    data/test_synthetic.py
    decode/test_sampling.py
    decode/test_utf8.py
    experiments/test_named_configs.py
    inspect/test_gold.py
    inspect/test_lexical.py
    inspect/test_metrics.py
    inspect/test_render.py
    inspect/test_segmentation.py
    inspect/test_store.py
    inspect/test_tags.py
    data/test_bpe.py
    nn/test_parameters.py
    parts/test_parts.py
    runtime/test_compile_cache.py
    test_config.py
    test_fields.py
    test_imports.py
    test_files.py
    test_loss.py
    test_outputs.py
    test_printable.py
    tpu/test_launch.py
    train/test_lock.py
    train/test_log_folder.py
    train/test_metrics_file.py
    """.split()
)
