"""A work directory of the version before parts is read, resumed and recognized."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hnet.chunking.losses.binomial import Binomial
from hnet.chunking.predictors.mlp import MLP
from hnet.errors import ConfigError
from hnet.train.workdir import read_config
from tests.training import rows, run

OLD_RUN = Path(__file__).parents[1] / "golden" / "old_run"
LOSSES = (5.249379634857178, 5.047784328460693)  # losses of updates 3 and 4 in that version
BPB = 7.009877986106028


@pytest.fixture
def workdir(tmp_path):
    return Path(shutil.copytree(OLD_RUN, tmp_path / "run"))


def test_its_configuration_is_the_same_network_in_parts(workdir):
    chunking = read_config(workdir).model.stages[0].chunking
    assert chunking.predictor == MLP.Config(width=11, temperature=0.4)
    assert chunking.losses == (Binomial.Config(weight=0.7),)
    assert (chunking.pool.name, chunking.dechunk.name) == ("mean", "repeat")
    assert chunking.hold_rate and chunking.alignment == "end" and chunking.residual == "add"


def test_it_resumes_with_the_losses_of_its_own_version(workdir):
    old = read_config(workdir)
    config = replace(old, workdir=str(workdir), train=replace(old.train, steps=4))
    outcome = run(config)
    found = [row["loss/ce"] for row in rows(config)]
    assert found == pytest.approx(LOSSES, rel=1e-6)
    assert outcome.evaluation.bpb == pytest.approx(BPB, rel=1e-6)


def test_a_part_that_it_did_not_know_is_refused_by_name(workdir):
    content = json.loads((workdir / "config.json").read_text())
    content["model"]["stages"][0]["chunking"]["router"] = "oracle"
    (workdir / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="predictor 'oracle' is unknown: use cosine"):
        read_config(workdir)
