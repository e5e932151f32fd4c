"""Every patch applies to the installed version, is described, and does what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import patching

SCRIPTS = Path(patching.__file__).parent
PATCHES = sorted(patching.PATCHES.glob("*.patch"))


def test_each_framework_has_some() -> None:
    names = [patching.package_of(patch) for patch in PATCHES]
    assert names == ["deepspeed", *["vllm"] * 6]


def patch_named(part: str) -> Path:
    (patch,) = [patch for patch in PATCHES if part in patch.name]
    return patch


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_applies_to_the_installed_version(patch: Path) -> None:
    site_packages = patching.package_folder(patching.package_of(patch)).parent
    result = patching.apply(patch, site_packages, "--dry-run")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "offset" not in result.stdout


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_is_described(patch: Path) -> None:
    readme = (patching.PATCHES / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if f"]({patch.name})" in line]
    assert row.count("|") == 6, "what, why, which hook, when it can go"


@pytest.mark.engine
def test_deepspeed_takes_the_policy_without_our_hook(tmp_path: Path) -> None:
    copy = patching.patched_copy(patch_named("kv-policy"), tmp_path)
    path = [copy, patching.ROOT]
    out = patching.run(
        SCRIPTS / "patched_deepspeed.py", path, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"
    )
    found = json.loads(out.splitlines()[-1])
    assert found["package"] == str(copy / "deepspeed")
    assert found["rebound"] == []
    assert found["same tokens"]
    assert found["caches"] == {"stock": "DynamicCache", "bmc": "BMCCache"}
    assert "kv_policy 'bcm' is not registered; available: 'bmc'" in found["refused"]["policy"]
    assert "allowed: r, T, attention, pack_linears" in found["refused"]["setting"]
    assert "kv_policy_config is given without kv_policy" in found["refused"]["alone"]
    assert "replace_with_kernel_inject" in found["refused"]["kernels"]


def with_and_without(patch: str | Path, script: str, folder: Path) -> tuple[Path, dict[str, dict]]:
    """The patched copy, and what the script prints with it ("patched") and without ("plain")."""
    named = patch_named(patch) if isinstance(patch, str) else patch
    copy = patching.patched_copy(named, folder / "site")
    found = {}
    for name, path in (("patched", [copy]), ("plain", [])):
        out = patching.run(
            SCRIPTS / script,
            [*path, patching.ROOT],
            str(folder / name),
            OMP_NUM_THREADS="1",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
        )
        found[name] = json.loads(out.splitlines()[-1])
    return copy, found


@pytest.mark.engine
def test_vllm_honors_the_backend_without_our_hook(tmp_path: Path) -> None:
    copy, found = with_and_without("registered-backend", "patched_vllm.py", tmp_path)
    assert found["patched"]["package"] == str(copy / "vllm")
    assert not found["patched"]["hook"]
    assert not found["plain"]["hook"]
    # Without patch and hook the choice is ignored; with the patch alone it is honored.
    assert found["plain"]["backends"] == ["CPUAttentionBackend"]
    assert found["patched"]["backends"] == ["BMCAttentionBackend"]
    assert found["patched"]["tokens"] == found["plain"]["tokens"]
    assert found["patched"]["head size 40"] == "CPUAttentionBackend"
    assert found["patched"]["not chosen"] == "CPUAttentionBackend"


@pytest.mark.engine
def test_vllm_samples_with_a_seed_while_a_prompt_is_in_parts(tmp_path: Path) -> None:
    script = "patched_vllm_seeds.py"
    copy, found = with_and_without("seeded-chunked-prefill", script, tmp_path)
    assert found["patched"]["package"] == str(copy / "vllm")
    assert found["plain"]["in parts"] == "CPU Generator does not use offset"
    assert found["patched"]["in parts"] == found["patched"]["whole"] == found["plain"]["whole"]


@pytest.mark.engine
def test_vllm_goes_on_behind_a_requests_last_block(tmp_path: Path) -> None:
    _, found = with_and_without("side-by-side", "patched_block_pool.py", tmp_path)
    patched, plain = found["patched"], found["plain"]
    assert patched["nowhere"] == plain["nowhere"] == [1, 2]
    # Behind block 4 two are free, and the third holds a prefix.
    assert patched["near"] == [5, 6, 1, 2]
    assert patched["request"] == [1, 2, 3, 4]
    assert plain["request"] != [1, 2, 3, 4]


@pytest.mark.engine
def test_vllm_samples_with_draft_tokens_and_without(tmp_path: Path) -> None:
    """Three patches, each of a file of its own, in one copy."""
    parts = ("expand-kernel", "steps-without-drafts", "top-k-of-no-rows")
    together = tmp_path / "sampling.patch"
    together.write_text("\n".join(patch_named(part).read_text() for part in parts))
    copy, found = with_and_without(together, "patched_vllm_sampling.py", tmp_path)
    patched, plain = found["patched"], found["plain"]
    assert patched["package"] == str(copy / "vllm")
    assert patched["expanded"] == [[0.7, 1.0, 1.0], [5, 9, 9]]
    assert plain["expanded"] == [[77, 77, 77], [77, 77, 77]]
    assert patched["top-k of no rows"] == [0, 8]
    assert "numel() == 0" in plain["top-k of no rows"]
    assert (patched["without drafts"], plain["without drafts"]) == ("plain", "rejection")
    assert patched["with drafts"] == plain["with drafts"] == "rejection"
