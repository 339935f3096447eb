"""What accelerators are by their vendors' data sheets: memory, and peaks for dense matrices.

What share of the peaks a model reaches is the business of `policy.latency`, what the links between them carry that of
`topology`. Memory as drivers count it: what vendors print as 80 GB is 80 GiB, read in vendors' sources. The other
figures are recalled from vendors' sheets.
"""

from __future__ import annotations

from penstock.fabric import Device

GIB = 2.0**30
TB = 1e12
TF = 1e12  # operations per second

A100 = Device("a100_sxm", 80 * GIB, 2.04 * TB, 312 * TF)
H100 = Device("h100_sxm", 80 * GIB, 3.35 * TB, 989 * TF, 1979 * TF)
H200 = Device("h200_sxm", 141 * GIB, 4.8 * TB, 989 * TF, 1979 * TF)
H20 = Device("h20_sxm", 96 * GIB, 4.0 * TB, 148 * TF, 296 * TF)
B200 = Device("b200_sxm", 180 * GIB, 8 * TB, 2250 * TF, 4500 * TF, 9000 * TF)
GB200 = Device("gb200", 186 * GIB, 8 * TB, 2500 * TF, 5000 * TF, 10000 * TF)  # 72 of them have "13.4 TB"
