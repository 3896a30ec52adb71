"""The list of seeded faults is up to date, and its runner tells faults from none. `make mutants` runs all of it."""

import mutants
import pytest


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_seeded_fault_is_applied_to_the_code_as_it_stands(mutant, tmp_path):
    package = mutants.ROOT / "fgsgd_jax"
    for name in {name for name, *_ in mutant.changes}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((package / name).read_text(encoding="utf-8"), encoding="utf-8")
    mutants.applied(tmp_path, mutant)
    for name in {name for name, *_ in mutant.changes}:
        changed = (tmp_path / name).read_text(encoding="utf-8")
        compile(changed, name, "exec")
        assert changed != (package / name).read_text(encoding="utf-8")
    for test in mutant.tests:
        file, name = test.split("::")
        assert f"def {name}(" in (mutants.ROOT / file).read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_fault_is_caught_and_none_is_not():
    by_name = {mutant.name: mutant for mutant in mutants.MUTANTS}
    fault = by_name["QR without its signs"]
    assert mutants.caught(fault)[0]
    harmless = mutants.mutant("none", ("linalg/_qr.py", "Sign-fixed QR", "Sign-fixed  QR"), by=fault.tests)
    assert not mutants.caught(harmless)[0]
