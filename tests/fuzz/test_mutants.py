"""What keeps tests/fuzz worth running: its mutants are checks that the core has, and its corpora can be replayed."""

import shutil
from pathlib import Path

import pytest

from tests.fuzz import corpus, mutants
from tests.fuzz.build import CORE, ROOT, TARGETS

MUTANTS = mutants.every()


def test_there_are_mutants_enough_and_each_is_named_once() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names)) >= 30


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_takes_away_a_check_that_is_there(mutant: mutants.Mutant, tmp_path: Path) -> None:
    source = (CORE if mutant.target in TARGETS else ROOT) / mutant.file
    (tmp_path / mutant.file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, tmp_path / mutant.file)
    mutant.apply(tmp_path)
    assert (tmp_path / mutant.file).read_text() != source.read_text()


@pytest.mark.parametrize("fault", ["receive_chains_past_the_arrays", "more_loans_than_the_ring_has"])
def test_the_faults_that_the_targets_were_made_for_are_among_the_mutants(fault: str) -> None:
    assert fault in {mutant.name for mutant in MUTANTS}


@pytest.mark.parametrize("target", ["guests", "oracle"])
def test_inputs_are_kept_for_each_target(target: str, tmp_path: Path) -> None:
    corpus.unpack(target, tmp_path)
    assert len(list(tmp_path.iterdir())) > 100
