"""Cores by the quotas of control groups, on trees of files as the kernel shows them."""

from pathlib import Path

import pytest

from sdt_deploy import cores


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, 0.5),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "300000 200000\n"}, 1.5),
        ("0::/docker/of-the-host\n", {"cpu.max": "100000 100000\n"}, 1.0),
        (
            "3:cpuset:/\n2:cpu,cpuacct:/pod\n0::/\n",
            {
                "cpu,cpuacct/pod/cpu.cfs_quota_us": "600000",
                "cpu,cpuacct/pod/cpu.cfs_period_us": "100000",
            }
            | {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            6.0,
        ),
        (
            "4:cpuacct,cpu:/pod\n",
            {"cpu/pod/cpu.cfs_quota_us": "50000\n", "cpu/pod/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("3:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "1", "cpuset/cpu.cfs_period_us": "1"}, None),
        ("0::/\n", {"cpu.max": "1 0"}, None),
        ("0::/\n", {"cpu.max": "\n"}, None),
        ("nonsense", {}, None),
        ("", {}, None),
    ],
)
def test_the_smallest_quota_counts(
    groups: str, files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    (tmp_path / "membership").write_text(groups)
    assert cores.cpu_quota(tree(tmp_path / "cgroup", files), tmp_path / "membership") == quota


def test_no_control_groups(tmp_path: Path) -> None:
    assert cores.cpu_quota(tmp_path / "none", tmp_path / "neither") is None


@pytest.mark.parametrize(
    ("quota", "expected"), [("max", 4), ("900000", 4), ("290000", 2), ("100000", 1), ("50000", 1)]
)
def test_cores(quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "membership").write_text("0::/\n")
    monkeypatch.setattr(cores, "CGROUPS", tree(tmp_path, {"cpu.max": f"{quota} 100000\n"}))
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert cores.usable_cores() == expected
